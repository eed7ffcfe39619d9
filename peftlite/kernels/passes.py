"""A layer of low rank, forward and back, of the operations of one path: see `linear.py`."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor


def forward(
    ops: ModuleType,
    x: Tensor,
    w: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (t, o), which is the low-rank part alone without W; and the scaled h (t, r)."""
    h = ops.shrink(x, a, scale, dropout, seed)
    if w is None:
        return ops.expand(h, b.t(), bias, 0.0, None, x.dtype), h
    return ops.product(x, w.t(), h, b.t(), bias, 0.0, None), h


def backward(
    ops: ModuleType,
    dy: Tensor,
    x: Tensor,
    w: Tensor | None,
    h: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    for_x: bool,
    for_a: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """dx and dA, where they are wanted, and dB."""
    dh, db = ops.grad_ab(dy, h, b, scale, dropout)
    if w is not None:
        dx = dy @ w if for_x else None
        return dx, ops.back(dh, x if for_a else None, dx, a, dropout, seed), db
    da = ops.grad_a(dh, x, dropout, seed) if for_a else None
    return ops.expand(dh, a, None, dropout, seed, x.dtype) if for_x else None, da, db


def back(
    ops: ModuleType,
    dh: Tensor,
    x: Tensor | None,
    dx: Tensor | None,
    a: Tensor,
    dropout: float,
    seed: Tensor | None,
) -> Tensor | None:
    """dA = dhᵀ drop(x), where x is given, and dx += drop(dh A), in place, where dx is."""
    da = None if x is None else ops.grad_a(dh, x, dropout, seed)
    if dx is not None:
        ops.add(dx, dh, a, dropout, seed)
    return da
