"""Row-mixed low-rank products in plain torch: the truth that `triton_rows` is tested against."""

from __future__ import annotations

from torch import Tensor


def rows_low_rank(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, slots: Tensor
) -> None:
    """y += s·(x Aᵀ) Bᵀ, each row of the batch with the factors of its slot. Slot 0 adds nothing.

    Shapes, for S slots of at most R ranks: y (b, ..., o), x (b, ..., i), A (S, R, i), B (S, o, R),
    scale and ranks (S,), slots (b,). What A and B hold beyond a slot's rank isn't read.
    """
    for slot in slots.unique().tolist():
        if slot > 0:
            own, rank = slots == slot, int(ranks[slot])
            h = x[own] @ a[slot, :rank].t()
            y[own] += scale[slot] * (h @ b[slot, :, :rank].t())
