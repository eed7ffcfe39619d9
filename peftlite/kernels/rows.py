"""y + s_k·B_k A_k x with a k of its own for every row of a batch: many deltas in one product.

Shapes, for S slots of at most R ranks: x (b, t, i), y (b, t, o), A (S, R, i), B (S, o, R), s and
the ranks (S,), k (b,). What a slot holds beyond its rank is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlite.kernels import dispatch
from peftlite.kernels.linear import differentiable
from peftlite.kernels.native import mixed
from peftlite.kernels.ops import op

Factors = tuple[Tensor, Tensor, float]
"""A (r, i), B (o, r) and s of one slot."""


def rows_low_rank(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, slots: Tensor
) -> Tensor:
    """The sum, by numbers on the device; y itself may be written to where nothing is learned."""
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, a, b))
    if not learns and dispatch.path_with(x, a.dtype) == "triton":
        torch.ops.peftlite.add_rows(y, x, a, b, scale, ranks, slots)
        return y
    a, b = a.index_select(0, slots), b.index_select(0, slots)
    return each_low_rank(y, x, a, b, scale.index_select(0, slots))


def each_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """The sum, with A (b, r, i), B (b, o, r) and s (b,) of the rows themselves."""
    h = torch.bmm(x.to(a.dtype), a.mT) * scale[:, None, None].to(a.dtype)
    if y.dtype is b.dtype:
        return torch.baddbmm(y, h, b.mT)
    return y + torch.bmm(h, b.mT).to(y.dtype)


def each_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: Tensor
) -> Tensor:
    """x Wᵀ + bias and that sum at once, for a frozen W (o, i): nothing as large as x is copied."""
    plain = dispatch.is_plain_weight(w) and not w.requires_grad and a.dtype is x.dtype is w.dtype
    if (
        not plain
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled(x.device.type)
        or (bias is not None and bias.requires_grad)
    ):
        return each_low_rank(F.linear(x, w, bias), x, a, b, scale)
    return EachLinear.apply(x, w, bias, a, b, scale[:, None, None].to(a.dtype))


class EachLinear(torch.autograd.Function):
    """As `lora_linear` has it, with factors for each row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: Tensor
    ) -> Tensor:
        h = torch.bmm(x, a.mT).mul_(s)
        ctx.save_for_backward(x, w, bias, a, b, s, h)
        return F.linear(x, w, bias).baddbmm_(h, b.mT)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, w, bias, a, b, s, h = ctx.saved_tensors
        if torch.is_grad_enabled():

            def again(x: Tensor, w: Tensor, bias: Any, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
                return each_low_rank(F.linear(x, w, bias), x, a, b, s[:, 0, 0])

            return differentiable(again, (x, w, bias, a, b, s), ctx.needs_input_grad, dy)
        dh = torch.bmm(dy, b).mul_(s)
        # by columns, as a bank's B lies
        db = torch.bmm(h.mT, dy).mT if ctx.needs_input_grad[4] else None
        da = torch.bmm(dh.mT, x) if ctx.needs_input_grad[3] else None
        dx = (dy @ w).baddbmm_(dh, a) if ctx.needs_input_grad[0] else None
        return dx, None, None, da, db, None


@op(
    "add_rows(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor scale, Tensor ranks, "
    "Tensor slots) -> ()",
    fake=lambda *_: None,
)
def _add_rows(*tensors: Tensor) -> None:
    from peftlite.kernels.triton import rows as triton_rows

    triton_rows.rows_low_rank(*tensors)


def mixed_low_rank(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    ranks: Tensor,
    known: Callable[[], tuple[Tensor, Tensor]],
) -> Tensor | None:
    """The sum added to y in place by C, where that is at hand for such tensors on a CPU.

    `known` gives the slots that there are, and which of them each row has, or -1 for the base.
    """
    if not dispatch.takes_native(x, a.dtype) or not mixed.fits(y, x, a, b, scale, ranks):
        return None
    return mixed.rows_low_rank(y, x, a, b, scale, ranks, *known())


def runs_low_rank(y: Tensor, x: Tensor, runs: Iterable[tuple[Factors, int, int]]) -> Tensor:
    """Adds to y in place, for runs of rows from start to stop, with the factors of their slot.

    On a CPU two products for each are as fast as any where a row has many tokens: no factor is
    copied, none is padded.
    """
    tokens, columns = x.shape[1:]
    x, rows = x.reshape(-1, columns), y.view(-1, y.shape[-1])
    for (a, b, scale), start, stop in runs:
        part, to = x[start * tokens : stop * tokens], rows[start * tokens : stop * tokens]
        h = part.to(a.dtype).mm(a.t())
        if to.dtype is b.dtype:
            to.addmm_(h, b.t(), alpha=scale)
        else:
            to.add_(h.mm(b.t()), alpha=scale)
    return y


def groups_low_rank(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor, rows: Tensor, unpadded: Tensor | None
) -> Tensor:
    """Adds to y in place, for n groups of m rows that share A (n, r, i) and B (n, o, r).

    It is for rows of few tokens: two products in all, and rows are copied instead of factors.

    Args:
        rows: (n·m,) of the batch.
        unpadded: those of them that count, where rows are repeated to fill a group; None for all.
    """
    part = x.index_select(0, rows).view(len(a), -1, x.shape[-1])
    h = torch.bmm(part.to(a.dtype), a.mT).mul_(scale[:, None, None])
    change = torch.bmm(h, b.mT).view(len(rows), -1, y.shape[-1]).to(y.dtype)
    if unpadded is not None:
        rows, change = rows.index_select(0, unpadded), change.index_select(0, unpadded)
    return y.index_add_(0, rows, change)
