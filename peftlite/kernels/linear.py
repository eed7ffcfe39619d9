"""y = x Wᵀ + bias + s·drop(x) Aᵀ Bᵀ, forward and backward, close to the cost of the frozen base.

    forward    h = s·drop(x) Aᵀ             y = h Bᵀ + bias,  y += x Wᵀ
    backward   dh = s·dY B,  dB = dYᵀ h     dx = drop(dh A),  dx += dY W      dA = dhᵀ drop(x)

The large product comes last and adds to what is there, so that y and dx are written once more and
rounded once. Beyond what the base keeps for the backward pass, x and the r numbers of h are kept.
An autograd.Function and no custom op: that one's dispatch costs more than the products of a small
map, and torch.compile sees into this one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from peftlite.kernels import dispatch, reference

_transforms = torch._C._functorch.peek_interpreter_stack


def lora_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + s·drop(x) Aᵀ Bᵀ, for x (..., i), W (o, i), A (r, i) and B (o, r).

    A and B may be wider than W, and are rounded to its dtype in every call. `seed`, an int64 tensor
    on the device of x, decides the mask of a dropout; without one it is drawn from torch's
    generator of that device.
    """
    if dispatch.is_plain(x, dropout) or dispatch.path(x, w) == "reference" or _transformed():
        return reference.lora_linear(x, w, bias, a, b, scale, dropout, seed)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w, bias = x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)
    if dropout and seed is None:
        seed = torch.randint(2**62, (), device=x.device)
    if not torch.is_grad_enabled():
        return _forward(x, w, bias, a, b, scale, dropout, seed)[0]
    if not a.requires_grad:  # with a frozen A, autograd keeps no x
        return reference.lora_linear(x, w, bias, a, b, scale, dropout, seed)
    return LoRALinear.apply(x, w, bias, a, b, scale, dropout, seed)


def _transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work."""
    if torch.compiler.is_compiling():
        return False
    return _transforms() is not None or forward_ad._current_level >= 0


def _forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y, and the scaled h."""
    ops, flat = dispatch.ops(x), _matrix(x)
    h = ops.shrink(flat, a.to(w.dtype), scale, dropout, seed)
    y = ops.expand(h, b.to(w.dtype).t(), bias, 0.0, None).addmm_(flat, w.t())
    return y if x.dim() == 2 else y.view(*x.shape[:-1], len(w)), h


def _matrix(x: Tensor) -> Tensor:
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
            return _differentiable(ctx, grad)
        x, w, _, a, b, seed, h = ctx.saved_tensors
        ops, flat, dy = dispatch.ops(x), _matrix(x), _matrix(grad)
        dx = dw = dbias = None
        dh, db = ops.grad_ab(dy, h, b.to(w.dtype), ctx.scale, ctx.dropout)
        da = ops.grad_a(dh, flat, ctx.dropout, seed)
        for_x, for_w, for_bias, *_ = ctx.needs_input_grad
        if for_x:
            dx = ops.expand(dh, a.to(w.dtype), None, ctx.dropout, seed).addmm_(dy, w).view(x.shape)
        if for_w:
            dw = dy.t() @ flat
        if for_bias:
            dbias = dy.sum(0)
        return dx, dw, dbias, da.to(a.dtype), db.to(b.dtype), None, None, None


def _differentiable(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as functions of what was saved: autograd's, through the reference."""
    *tensors, seed, _ = ctx.saved_tensors
    # views, since a tensor may come in twice
    inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    wanted = [i for i in range(5) if ctx.needs_input_grad[i]]
    y = reference.lora_linear(*inputs, ctx.scale, ctx.dropout, seed)
    found = torch.autograd.grad(y, [inputs[i] for i in wanted], grad, create_graph=True)
    gradients: list[Tensor | None] = [None] * 8
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)
