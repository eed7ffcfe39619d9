"""To y of every token, what its own delta and its expert's add: y + s_k·x U V.

    forward    h = s_k·x U,   y += h V                      of the tokens of each expert and delta
    backward   dh = s_k·dY Vᵀ,  dV = hᵀ dY,  dU = xᵀ dh,  dx = dh Uᵀ

On a CPU each product is made in place, so that r numbers a token are all there is more, and a
gradient is as large as a table once; where C can, by one call for all. Elsewhere, and where a
backward pass is itself to be differentiated, autograd sees plain products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftlite.kernels import dispatch
from peftlite.kernels.linear import differentiable, matrix
from peftlite.kernels.native import experts as native
from peftlite.kernels.native.experts import Each

Groups = Sequence[tuple[tuple[int, int], Tensor]]
"""Experts and deltas that there are, and the tokens of each."""


def by_tokens(
    y: Tensor,
    x: Tensor,
    own: Tensor,
    experts: Tensor | None,
    left: Tensor,
    right: Tensor,
    scale: Tensor,
) -> Tensor:
    """y (n, …, o), in place, and s_k·x U V of every token: for k of `own` (n,), or -1.

    U is (e, k, i, r), V (e, k, r, o) and s (k,), and e of `experts` (n,).
    """
    y, groups = y.contiguous(), _groups(own, experts, left.shape[1])
    if not groups:
        return y
    plain = x.is_cpu and dispatch.is_plain_weight(x) and not torch.is_autocast_enabled("cpu")
    if not plain or dispatch.by_autograd(left):
        return reference(y, x, groups, left, right, scale)
    if not torch.is_grad_enabled():
        return _add(y, x, groups, left, right, scale)[0]
    return ByTokens.apply(y, x, groups, left, right, scale)


def _groups(own: Tensor, experts: Tensor | None, count: int) -> Groups:
    key = own if experts is None else torch.where(own < 0, own, experts * count + own)
    ordered, order = key.sort()
    which, sizes = ordered.unique_consecutive(return_counts=True)
    parts = zip(which.tolist(), order.split(sizes.tolist()), strict=True)
    return [(divmod(at, count), tokens) for at, tokens in parts if at >= 0]


def reference(
    y: Tensor, x: Tensor, groups: Groups, left: Tensor, right: Tensor, scale: Tensor
) -> Tensor:
    """The same by products that autograd sees."""
    order = torch.cat([tokens for _, tokens in groups])
    parts = _rows(x, order).split([len(tokens) for _, tokens in groups])
    changes = [
        (part.to(left.dtype) @ left[at] * scale[at[1]]) @ right[at]
        for (at, _), part in zip(groups, parts, strict=True)
    ]
    flat = y.reshape(len(y), -1, y.shape[-1])
    return flat.index_add_(0, order, torch.cat(changes).to(y.dtype)).view(y.shape)


def _rows(x: Tensor, tokens: Tensor) -> Tensor:
    return x.reshape(len(x), -1, x.shape[-1])[tokens]


def _add(
    y: Tensor, x: Tensor, groups: Groups, left: Tensor, right: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """y, in place, and the scaled h of every group, one after another."""
    wide = torch.promote_types(x.dtype, left.dtype)
    left, right, scales = left.to(wide), right.to(wide), scale.tolist()
    each = _each(groups, (x, y), (left.mT, right))
    if each is not None:
        h = each.shrink(x, left.mT, [scales[k] for (_, k), _ in groups])
        each.add(y, h, right)
        return y, h
    ops, kept = dispatch.ops(x, wide), []
    for at, tokens in groups:
        h = ops.shrink(matrix(_rows(x, tokens)), left[at].mT, scales[at[1]], 0.0, None)
        _add_rows(ops, y, tokens, h, right[at])
        kept.append(h)
    return y, torch.cat(kept)


def _add_rows(ops: Any, y: Tensor, tokens: Tensor, h: Tensor, up: Tensor) -> None:
    flat = y.view(len(y), -1, y.shape[-1])
    flat[tokens] = ops.add(matrix(flat[tokens]), h, up, 0.0, None).view(
        len(tokens), *flat.shape[1:]
    )


def _each(groups: Groups, rows: Sequence[Tensor], factors: Sequence[Tensor]) -> Each | None:
    """C's way through all groups at once, where it knows what is there."""
    taken = dispatch.path_with(rows[0], factors[0].dtype) == "native"
    return Each(groups, rows[0]) if taken and native.fits(groups, rows, factors) else None


class ByTokens(torch.autograd.Function):
    """`by_tokens`, with gradients that are added up where they are to be."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        groups: Groups,
        left: Tensor,
        right: Tensor,
        scale: Tensor,
    ) -> Tensor:
        ctx.mark_dirty(y)
        y, h = _add(y, x, groups, left, right, scale)
        ctx.save_for_backward(x, left, right, scale, h)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), groups = grad_outputs, ctx.groups
        x, left, right, scale, h = ctx.saved_tensors
        if torch.is_grad_enabled():

            def again(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
                return reference(torch.zeros_like(dy), x, groups, left, right, scale)

            needed = [ctx.needs_input_grad[k] for k in (1, 3, 4)]
            dx, dleft, dright = differentiable(again, (x, left, right), needed, dy)
        else:
            dx, dleft, dright = _backward(ctx, dy.contiguous(), x, left, right, scale, h)
        return dy, dx, None, dleft, dright, None


def _backward(
    ctx: Any, dy: Tensor, x: Tensor, left: Tensor, right: Tensor, scale: Tensor, h: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    groups, scales = ctx.groups, scale.tolist()
    left, right = left.to(h.dtype), right.to(h.dtype)
    dx = x.new_zeros(x.shape) if ctx.needs_input_grad[1] else None
    dleft = torch.zeros_like(left) if ctx.needs_input_grad[3] else None
    dright = torch.zeros_like(right)
    rows = [t for t in (dy, None if dleft is None else x, dx) if t is not None]
    each = _each(groups, rows, (left.mT, right))
    if each is not None:
        dh = each.grad_b(dy, h, right, [scales[k] for (_, k), _ in groups], dright)
        if dleft is not None:
            each.grad_a(x, dh, dleft.mT)
        if dx is not None:
            each.add(dx, dh, left.mT)
        return dx, dleft, dright
    ops, rows_each = dispatch.ops(dy, h.dtype), x.shape[1:-1].numel()
    lows = h.split([len(tokens) * rows_each for _, tokens in groups])
    for (at, tokens), low in zip(groups, lows, strict=True):
        dh, db = ops.grad_ab(matrix(_rows(dy, tokens)), low, right[at].mT, scales[at[1]], 0.0)
        dright[at] = db.mT
        if dleft is not None:
            dleft[at] = ops.grad_a(dh, matrix(_rows(x, tokens)), 0.0, None).mT
        if dx is not None:
            _add_rows(ops, dx, tokens, dh, left[at].mT)
    return dx, dleft, dright
