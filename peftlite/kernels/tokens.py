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
from peftlite.kernels.experts import add, gradients
from peftlite.kernels.linear import differentiable

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
        add(groups, y, x, left, right, _scales(groups, scale))
        return y
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
    parts = x.reshape(len(x), -1, x.shape[-1])[order].split([len(tokens) for _, tokens in groups])
    changes = [
        (part.to(left.dtype) @ left[at] * scale[at[1]]) @ right[at]
        for (at, _), part in zip(groups, parts, strict=True)
    ]
    flat = y.reshape(len(y), -1, y.shape[-1])
    return flat.index_add_(0, order, torch.cat(changes).to(y.dtype)).view(y.shape)


def _scales(groups: Groups, scale: Tensor) -> list[float]:
    """Those of the groups."""
    of_deltas = scale.tolist()
    return [of_deltas[k] for (_, k), _ in groups]


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
        h = add(groups, y, x, left, right, _scales(groups, scale))
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
            dx = x.new_zeros(x.shape) if ctx.needs_input_grad[1] else None
            given = dy.contiguous(), h, left, right, _scales(groups, scale)
            known = x if ctx.needs_input_grad[3] else None
            dleft, dright = gradients(groups, *given, known, dx)
        return dy, dx, None, dleft, dright, None
