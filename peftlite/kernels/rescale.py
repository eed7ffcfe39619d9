"""y + change ⊙ (y − bias): a map's outputs scaled, but not its bias, as DoRA and (IA)³ do it.

Near 1 a factor is coarse in half precision, and its difference from 1 is not. The fast path takes
some of y at a time, while that is in the cache, and keeps y alone for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from peftlite.kernels import dispatch

_ENTRIES = 2**17  # of y, that are taken at a time


def rescale(y: Tensor, change: Tensor, bias: Tensor | None = None, behind: int = 0) -> Tensor:
    """y + change ⊙ (y − bias), for y (..., o, *positions), and a change and a bias (o).

    Args:
        behind: how many dimensions of y there are behind that of the outputs.
    """
    if torch.compiler.is_compiling() or dispatch.by_autograd(y):
        return reference(y, change, bias, behind)
    return _Rescale.apply(y, change, bias, behind)


def reference(y: Tensor, change: Tensor, bias: Tensor | None = None, behind: int = 0) -> Tensor:
    """`rescale` in plain torch: y (..., o, *positions), a change and a bias (o)."""
    change, bias = _columns(y, change, bias, behind)
    return torch.addcmul(y, _without(bias, y), change)


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, change: Tensor, bias: Tensor | None, behind: int) -> Tensor:
        ctx.save_for_backward(y, change, bias)
        ctx.behind = behind
        out = _forward(y, change, bias, behind)
        # no view to autograd, so that it may be changed in place
        return torch.ops.aten._unsafe_view(out, y.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dout,), (y, change, bias) = grad_outputs, ctx.saved_tensors
        # what is itself to be differentiated is found in one piece
        gradients = _gradients_whole if torch.is_grad_enabled() else _gradients
        dy, dchange = gradients(dout, y, change, bias, ctx.behind)
        for_bias = -change * _total(dout, ctx.behind) if ctx.needs_input_grad[2] else None
        return dy, dchange, for_bias, None


def _forward(y: Tensor, change: Tensor, bias: Tensor | None, behind: int) -> Tensor:
    """(n, o, *positions)."""
    if triton := _triton(y, behind):
        return triton.rescale(_flat(y, behind), change, bias)
    change, bias = _columns(y, change, bias, behind)
    out = torch.empty_like(_flat(y, behind))
    for to, part in _parts(behind, out, y):
        torch.addcmul(part, _without(bias, part), change, out=to)
    return out


def _gradients(
    dout: Tensor, y: Tensor, change: Tensor, bias: Tensor | None, behind: int
) -> tuple[Tensor, Tensor]:
    """What y and the change get."""
    if triton := _triton(y, behind):
        dy, dchange, _ = triton.gradients(_flat(dout, behind), _flat(y, behind), change, bias)
        return dy.view(y.shape), dchange
    dy, dchange = torch.empty_like(_flat(dout, behind)), torch.zeros_like(change)
    change, bias = _columns(y, change, bias, behind)
    for to, part, above in _parts(behind, dy, y, dout):
        torch.addcmul(above, above, change, out=to)
        dchange += _total(above * _without(bias, part), behind)
    return dy.view(y.shape), dchange


def _gradients_whole(
    dout: Tensor, y: Tensor, change: Tensor, bias: Tensor | None, behind: int
) -> tuple[Tensor, Tensor]:
    """`_gradients` that autograd sees into."""
    change, bias = _columns(y, change, bias, behind)
    return torch.addcmul(dout, dout, change), _total(dout * _without(bias, y), behind)


def _triton(y: Tensor, behind: int) -> ModuleType | None:
    """The operations for y on a GPU, where they are faster."""
    if behind or dispatch.path_with(y, y.dtype) != "triton":
        return None
    from peftlite.kernels.triton import rescale as triton_rescale

    return triton_rescale


def _columns(
    y: Tensor, change: Tensor, bias: Tensor | None, behind: int
) -> tuple[Tensor, Tensor | None]:
    """A number for every output, as it lies along y."""
    shape = (-1, *(1 for _ in range(behind)))
    change = change.to(y.dtype).view(shape)
    return change, None if bias is None else bias.to(y.dtype).view(shape)


def _without(bias: Tensor | None, y: Tensor) -> Tensor:
    return y if bias is None else y - bias


def _flat(y: Tensor, behind: int) -> Tensor:
    """y as (n, o, *positions)."""
    ahead = y.dim() - 1 - behind
    return y[None] if ahead == 0 else y if ahead == 1 else y.flatten(0, ahead - 1)


def _parts(behind: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, the same rows of each at a time."""
    flat = [_flat(tensor, behind) for tensor in tensors]
    n, each = len(flat[0]), max(flat[0].shape[1:].numel(), 1)
    at_once = max(_ENTRIES // each, 1) if flat[0].is_cpu else max(n, 1)
    return zip(*(tensor.split(at_once) for tensor in flat), strict=True)


def _total(z: Tensor, behind: int) -> Tensor:
    """The sum of z (..., o, *positions) for every output, in fp32 at least."""
    z = _flat(z, behind)
    dims = [d for d in range(z.dim()) if d != 1]
    return z.sum(dims, dtype=torch.promote_types(z.dtype, torch.float32))
