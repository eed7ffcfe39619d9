"""Beside a product with a stack of matrices, what a low rank adds: each token by its expert.

    forward    y = x W,   h = s·x U,   y += h V         of every expert's own tokens
    backward   dx = dY Wᵀ,  dh = s·dY Vᵀ,  dV = hᵀ dY,  dU = xᵀ dh,  dx += dh Uᵀ

The large products are the model's own. On a CPU the others are made an expert at a time, in place,
so that r numbers a token are all there is more; where C can, by one call for all experts. On a GPU,
where that would wait for the device to say whose the tokens are, they are products of the model's
kind, in the dtype of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlite.kernels import dispatch
from peftlite.kernels.linear import differentiable, matrix
from peftlite.kernels.native import experts
from peftlite.kernels.native.experts import Each, Groups

Rows = slice | int | Tensor


class Product(NamedTuple):
    """How a model multiplies with a stack of matrices.

    Attributes:
        times: y of x and a stack W (e, i, o), of any i and o.
        groups: experts, and which of the leading entries of x and y are theirs.
        ids: the experts (n,) whose matrices W has, where it isn't the stack itself.
    """

    times: Callable[[Tensor, Tensor], Tensor]
    groups: Callable[[], Groups]
    ids: Tensor | None = None

    def taken(self, factors: Tensor) -> Tensor:
        """Factors (e, …) of every matrix of W."""
        return factors if self.ids is None else factors[self.ids]


def experts_linear(
    product: Product, x: Tensor, w: Tensor, left: Tensor, right: Tensor, scale: float = 1.0
) -> Tensor:
    """x (W + s·UV), for W (n, i, o), and U (e, i, r) and V (e, r, o) of every expert."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w, left, right = (tensor.to(dtype) for tensor in (x, w, left, right))
    plain = dispatch.is_plain_weight(x) and x.is_cpu and not w.requires_grad
    if not plain or dispatch.by_autograd(w):
        return reference(product, x, w, left, right, scale)
    if not torch.is_grad_enabled():
        return _forward(product, x, w, left, right, scale)[0]
    return ExpertsLinear.apply(product, x, w, left, right, scale)


def reference(
    product: Product, x: Tensor, w: Tensor, left: Tensor, right: Tensor, scale: float
) -> Tensor:
    """The same by products of the model's kind alone."""
    wide = torch.promote_types(x.dtype, left.dtype) if x.is_cpu else x.dtype
    missing = -left.shape[-1] % 8  # of ranks, until rows begin where grouped products want them to
    left = F.pad(product.taken(left).to(wide), (0, missing))
    right = F.pad(product.taken(right).to(wide), (0, 0, 0, missing))
    change = product.times(product.times(x.to(wide), left), right)
    return torch.add(product.times(x, w), change, alpha=scale).to(x.dtype)


def _forward(
    product: Product, x: Tensor, w: Tensor, left: Tensor, right: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """y, and the scaled h of every expert that is hit, one after another."""
    y, groups = product.times(x, w), product.groups()
    return y, add(groups, y, x, left, right, [scale] * len(groups))


def add(
    groups: Groups, y: Tensor, x: Tensor, left: Tensor, right: Tensor, scales: list[float]
) -> Tensor:
    """The scaled h of every group, one after another; y has its part added, in place."""
    wide = torch.promote_types(x.dtype, left.dtype)
    left, right = left.to(wide), right.to(wide)
    each = _each(groups, (x, y), left, right)
    if each is not None:
        h = each.shrink(x, left.mT, scales)
        each.add(y, h, right)
        return h
    ops, kept = dispatch.ops(x, wide), []
    for (key, rows), scale in zip(groups, scales, strict=True):
        h = ops.shrink(matrix(x[rows]), left[key].mT, scale, 0.0, None)
        _add_to(ops, y, rows, h, right[key])
        kept.append(h)
    return torch.cat(kept) if kept else left.new_empty(0, left.shape[-1])


def gradients(
    groups: Groups,
    dy: Tensor,
    h: Tensor,
    left: Tensor,
    right: Tensor,
    scales: list[float],
    x: Tensor | None,
    dx: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """dU where there is x, and dV; dx has its part added where there is one."""
    left, right = left.to(h.dtype), right.to(h.dtype)
    dleft, dright = (
        torch.empty_like(f) if f[..., 0, 0].numel() == len(groups) else torch.zeros_like(f)
        for f in (left, right)
    )
    each = _each(groups, [t for t in (dy, x, dx) if t is not None], left, right)
    if each is not None:
        dh = each.grad_b(dy, h, right, scales, dright)
        if x is not None:
            each.grad_a(x, dh, dleft.mT)
        if dx is not None:
            each.add(dx, dh, left.mT)
        return None if x is None else dleft, dright
    ops, first = dispatch.ops(dy, h.dtype), 0
    for (key, rows), scale in zip(groups, scales, strict=True):
        own = matrix(dy[rows])
        dh, db = ops.grad_ab(own, h[first : first + len(own)], right[key].mT, scale, 0.0)
        dright[key], first = db.mT, first + len(own)
        if x is not None:
            dleft[key] = ops.grad_a(dh, matrix(x[rows]), 0.0, None).mT
        if dx is not None:
            _add_to(ops, dx, rows, dh, left[key].mT)
    return None if x is None else dleft, dright


def _each(groups: Groups, rows: Sequence[Tensor], left: Tensor, right: Tensor) -> Each | None:
    """C's way through all experts at once, where it knows what is there."""
    native = dispatch.path_with(rows[0], left.dtype) == "native"
    known = native and experts.fits(groups, rows, (left.mT, right))
    return Each(groups, rows[0]) if known else None


def _add_to(ops: Any, y: Tensor, rows: Rows, h: Tensor, up: Tensor) -> None:
    """Adds h U to some rows of y."""
    own = y[rows]
    ops.add(matrix(own), h, up, 0.0, None)
    if isinstance(rows, Tensor):  # then they are a copy
        y[rows] = own


class ExpertsLinear(torch.autograd.Function):
    """`experts_linear`; a backward pass that is itself to be differentiated takes the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        product: Product,
        x: Tensor,
        w: Tensor,
        left: Tensor,
        right: Tensor,
        scale: float,
    ) -> Tensor:
        y, h = _forward(product, x, w, left, right, scale)
        ctx.save_for_backward(x, w, left, right, h)
        ctx.product, ctx.scale = product, scale
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        product, needed = ctx.product, ctx.needs_input_grad[1:5]
        x, w, left, right, h = ctx.saved_tensors
        if torch.is_grad_enabled():

            def again(x: Tensor, w: Tensor, left: Tensor, right: Tensor) -> Tensor:
                return reference(product, x, w, left, right, ctx.scale)

            found = differentiable(again, (x, w, left, right), needed, *grad_outputs)
            return None, *found, None
        dy = grad_outputs[0].contiguous()
        dx = product.times(dy, w.mT) if needed[0] else None
        groups, known = product.groups(), x if needed[2] else None
        scales = [ctx.scale] * len(groups)
        dleft, dright = gradients(groups, dy, h, left, right, scales, known, dx)
        return None, dx, None, dleft, dright, None
