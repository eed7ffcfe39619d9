"""y = x Wᵀ + bias + s·drop(x) Aᵀ Bᵀ, forward and backward, close to the cost of the frozen base.

    forward    h = s·drop(x) Aᵀ             y = x Wᵀ + bias + h Bᵀ
    backward   dh = s·dY B,  dB = dYᵀ h     dx = dY W + drop(dh A)      dA = dhᵀ drop(x)

Beyond what the base keeps for the backward pass, x and the r numbers of h are kept, these in the
dtype of the factors: in a narrower one dB would be as coarse as that. Nothing here waits for the
device, so a CUDA graph can hold it, and a seed is drawn where x is: no mask is kept, and a
recomputation draws the same one.

An autograd.Function and no custom op: through torch.library a small map took 188 µs where this
takes 70, and torch.compile sees into this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlite.errors import PeftliteError
from peftlite.kernels import dispatch, reference


def lora_linear(
    x: Tensor,
    w: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + s·drop(x) Aᵀ Bᵀ, for x (..., i), W (o, i), A (r, i) and B (o, r).

    Where A and B are wider than W, x Aᵀ and whatever else has a side of r is formed in their dtype,
    and rounded once, to y and to dx; in fp32 where C multiplies. Under autocast all is in its
    dtype. `seed`, an int64 tensor on the device of x, decides the mask of a dropout; without one it
    is drawn from torch's generator of that device. Without W, it is the low-rank part alone.

    Raises:
        PeftliteError: in the backward pass, since W's class has a product of its own without one.

    Example:
        x, w, a, b = torch.randn(5, 4), torch.randn(2, 4), torch.randn(1, 4), torch.randn(2, 1)
        y = pl.kernels.lora_linear(x, w, None, a, b, scale=2.0)
    """
    if w is not None and not dispatch.is_plain_weight(w):
        return _own(x, w, bias) + lora_linear(x, None, None, a, b, scale, dropout, seed)
    if dispatch.by_autograd(x, dropout):
        return reference.lora_linear(x, w, bias, a, b, scale, dropout, seed)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
        w, bias = (None if tensor is None else tensor.to(dtype) for tensor in (w, bias))
    if not dropout:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (), device=x.device)
    if not torch.is_grad_enabled():
        return _forward(x, w, bias, a, b, scale, dropout, seed)[0]
    if not a.requires_grad and not dropout:  # then autograd keeps neither x nor a mask
        return reference.lora_linear(x, w, bias, a, b, scale)
    return LoRALinear.apply(x, w, bias, a, b, scale, dropout, seed)


def _own(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """The product of a class of tensors of its own."""
    y = F.linear(x, w, bias)
    lost = x.requires_grad and torch.is_grad_enabled() and not y.requires_grad
    return _WithoutGradient.apply(y, x, type(w).__name__) if lost else y


class _WithoutGradient(torch.autograd.Function):
    """y, which came of x and doesn't know it: fine, unless somebody wants x's gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, kind: str) -> Tensor:
        ctx.kind = kind
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise PeftliteError(
            f"the product of {ctx.kind} passes no gradient on, as where activations are quantised "
            "too: what comes before it can't learn. Take it to serve, and train on a base whose "
            "weights alone are quantised"
        )


def _forward(
    x: Tensor,
    w: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y, and the scaled h."""
    flat = matrix(x)
    wide = dispatch.wide(flat, a, b)
    ops = dispatch.ops(x, wide)
    y, h = ops.forward(flat, w, bias, a.to(wide), b.to(wide), scale, dropout, seed)
    if y.dim() == x.dim():
        return y, h
    # no view, for who changes y in place
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], b.shape[0])), h


def matrix(x: Tensor) -> Tensor:
    """x (..., i) as (t, i)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class LoRALinear(torch.autograd.Function):
    """`lora_linear`; a backward pass that is itself to be differentiated takes the reference."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, h = _forward(*inputs)
        *tensors, ctx.scale, ctx.dropout, seed = inputs
        ctx.save_for_backward(*tensors, seed, h)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            *tensors, seed, _ = ctx.saved_tensors

            def again(*tensors: Tensor) -> Tensor:
                options = {"scale": ctx.scale, "dropout": ctx.dropout, "seed": seed}
                return reference.lora_linear(*tensors, **options)

            return differentiable(again, tensors, ctx.needs_input_grad, grad)
        x, w, _, a, b, seed, h = ctx.saved_tensors
        ops, flat, dy = dispatch.ops(x, h.dtype), matrix(x), matrix(grad)
        for_x, for_w, for_bias, for_a, *_ = ctx.needs_input_grad
        given = dy, flat, w, h, a.to(h.dtype), b.to(h.dtype), ctx.scale, ctx.dropout, seed
        dx, da, db = ops.backward(*given, for_x, for_a)
        if dx is not None:
            dx = dx.view(x.shape)
        dw = dy.t() @ flat if for_w else None
        dbias = dy.sum(0) if for_bias else None
        # autograd rounds a gradient to the dtype of what it is for
        return dx, dw, dbias, da, db, None, None, None


def differentiable(
    call: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of the needed tensors for that of call(*tensors), themselves differentiable.

    There is one for everything that `needed` speaks of; what comes after the tensors gets None.
    """
    # views, since a tensor may come in twice
    inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    wanted = {i: t for i, t in enumerate(inputs) if t is not None and needed[i]}
    y = call(*inputs)
    found = torch.autograd.grad(y, list(wanted.values()), grad, create_graph=True)
    gradients: list[Tensor | None] = [None] * len(needed)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)
