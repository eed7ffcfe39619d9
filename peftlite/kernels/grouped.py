"""`lora_linear` for maps that take one input, as q, k and v do: their A's are one matrix to it.

    forward    h = s·drop(x) [A_q; A_k; A_v]ᵀ                              once for all
               y_q = h_q B_qᵀ + bias,  y_q += x W_qᵀ                       each its own
    backward   dh_q = dY_q B_q,  dB_q = dY_qᵀ h_q,  dx_q = dY_q W_q        each its own
               dA = s·[dh_q dh_k dh_v]ᵀ drop(x),  dx = Σ dx_q + s·drop(dh A)    once for all

Who takes one input shows only as they are called. So the first of a group that is called forms the
h of all and leaves the others theirs, for the very same tensor in the same state of torch; who
comes with anything else goes its own way. What is left lives as long as the graph of the first
one's result, which has to hold x anyway; without a graph, as long as x. On the way back each brings
what it saved, so that any of them may go back alone.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import ReferenceType

import torch
from torch import Tensor

from peftlite.kernels import dispatch, reference
from peftlite.kernels.linear import lora_linear, matrix

_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_here = threading.local()


class State(NamedTuple):
    """All that a product of x goes by, beside which tensors it is of."""

    version: int
    for_x: bool
    dtype: torch.dtype
    scale: float
    dropout: float
    autocast: torch.dtype | None
    graph: bool
    saves: Any
    stream: Any


class Part(NamedTuple):
    """What is left for one map: its h, and x by way of the node in which its gradients meet."""

    a: Tensor
    version: int
    state: State
    factors: tuple[Tensor, ...]  # the A's of all
    x: Tensor | None  # where None, the caller's own will do
    h: Tensor


class Group:
    """The maps that share an x, from the first one's call on; and the way back, where they meet."""

    x: ReferenceType[Tensor]
    scale: float
    dropout: float
    owner: ReferenceType[Any]

    def __init__(self, x: Tensor, scale: float, dropout: float):
        self.x, self.scale, self.dropout = weakref.ref(x), scale, dropout
        self.seed: Tensor | None = torch.randint(2**62, (), device=x.device) if dropout else None
        self.parts: dict[int, Part] = {}  # what is left, by the id of an A
        self.brought: list[Any] = []  # x and the A's, on the way back
        self.lasting = False  # whether that way is differentiated, and may be gone again

    def take(self, x: Tensor, a: Tensor, state: State) -> Part | None:
        part = self.parts.get(id(a)) if self.x() is x else None
        if part is None or part.version != a._version or part.state != state:
            return None
        return self.parts.pop(id(a), None)

    def leave(self, parts: dict[int, Part], owner: Any) -> None:
        """Leaves parts for the others in this thread, while the owner lives."""
        self.parts = parts
        self.owner = weakref.ref(owner, lambda _: parts.clear())
        _here.group = self


def grouped_linear(
    alike: Callable[[], Sequence[Tensor]],
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """`lora_linear`, for a map that may share its x with others, and the mask of x with it.

    `alike` gives the A of each, this one's among them, that x is to be multiplied with at once,
    scaled and dropped out as here. They are tensors that are kept, not made for the call.
    """
    if not _may_share(x, w, dropout):
        return lora_linear(x, w, bias, a, b, scale, dropout)
    state = _state(x, w, scale, dropout)
    group: Group | None = getattr(_here, "group", None)
    part, parts = None if group is None else group.take(x, a, state), {}
    if group is None or part is None:
        factors = [factor for factor in alike() if _stacks(factor, a)]
        if len(factors) < 2 or all(factor is not a for factor in factors):
            return lora_linear(x, w, bias, a, b, scale, dropout)
        group = Group(x, scale, dropout)
        parts = _shrink(group, x, factors, state)
        part = parts.pop(id(a))
    if state.autocast is not None:
        w, bias = w.to(state.autocast), None if bias is None else bias.to(state.autocast)
    y = Expand.apply(group, part.factors, x if part.x is None else part.x, w, bias, part.h, b)
    if parts:
        group.leave(parts, y.grad_fn or x)
    return y


def _may_share(x: Tensor, w: Tensor, dropout: float) -> bool:
    """Whether x has a fast path, to a W without gradients, and tells when it is changed."""
    return (
        not dispatch.by_autograd(x, dropout)
        and dispatch.is_plain_weight(w)
        and not w.requires_grad
        and not x.is_inference()
    )


def _state(x: Tensor, w: Tensor, scale: float, dropout: float) -> State:
    device, graph = x.device.type, torch.is_grad_enabled()
    return State(
        x._version,
        x.requires_grad,
        w.dtype,
        scale,
        dropout,
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        graph,
        _saved_tensors_hooks(True) if graph else None,  # a checkpointed call has its own
        torch.cuda.current_stream(x.device) if x.is_cuda else None,
    )


def _stacks(factor: Tensor, a: Tensor) -> bool:
    """Whether a factor can be laid upon A."""
    alike = factor.dtype is a.dtype and factor.device == a.device
    return alike and factor.shape[1:] == a.shape[1:] and dispatch.is_plain_weight(factor)


def _shrink(group: Group, x: Tensor, factors: Sequence[Tensor], state: State) -> dict[int, Part]:
    """The parts of all, by the ids of their A's."""
    low = x if state.autocast is None else x.to(state.autocast)
    dtype = state.autocast or torch.promote_types(state.dtype, factors[0].dtype)
    way, *hs = Shrink.apply(group, low, dtype, *factors)
    if not (state.graph and state.for_x):
        way = None if low is x else low  # x itself would be held by what lasts as long as x
    common = state, tuple(factors), way
    return {id(a): Part(a, a._version, *common, h) for a, h in zip(factors, hs, strict=True)}


class Shrink(torch.autograd.Function):
    """x as it is, for its gradients to meet here, and s·drop(x) Aᵀ for every A."""

    @staticmethod
    def forward(
        ctx: Any, group: Group, x: Tensor, dtype: torch.dtype, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.group, ctx.shape, ctx.dtype, ctx.ops = group, x.shape, x.dtype, dispatch.ops(x, dtype)
        a = torch.cat(factors).to(dtype)
        h = ctx.ops.shrink(matrix(x), a, group.scale, group.dropout, group.seed)
        return x, *h.split([len(factor) for factor in factors], 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        group, (dx, *dhs) = ctx.group, grad_outputs
        came = [k for k, dh in enumerate(dhs) if dh is not None]
        gradients: list[Tensor | None] = [None] * len(dhs)
        if came:
            x, *factors = group.brought
            group.lasting |= torch.is_grad_enabled()
            if not group.lasting:
                group.brought = []
            dh = torch.cat([dhs[k] for k in came], 1)
            a = torch.cat([factors[k] for k in came]).to(dh.dtype)
            back = _back_again if torch.is_grad_enabled() else _back
            dx, da = back(ctx, dx, dh, x, a)
            if da is not None:
                for k, own in zip(came, da.split([len(factors[k]) for k in came]), strict=True):
                    gradients[k] = own
        return None, dx, None, *gradients


def _back(
    ctx: Any, dx: Tensor | None, dh: Tensor, x: Tensor | None, a: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """dx with s·drop(dh A) added to it in place, for it comes from `Expand` alone; and dA."""
    ops, dropout, seed = ctx.ops, ctx.group.dropout, ctx.group.seed
    factor = reference.scaled(ctx.group.scale, dropout)
    if factor != 1:
        dh.mul_(factor)
    flat = None
    if ctx.needs_input_grad[1]:
        flat = a.new_zeros(len(dh), a.shape[1], dtype=ctx.dtype) if dx is None else matrix(dx)
    da = ops.back(dh, None if x is None else matrix(x), flat, a, dropout, seed)
    return None if flat is None else flat.view(ctx.shape), da


def _back_again(
    ctx: Any, dx: Tensor | None, dh: Tensor, x: Tensor | None, a: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The same, so that it can be differentiated."""
    dropout, seed = ctx.group.dropout, ctx.group.seed
    dh = dh * ctx.group.scale
    da = None if x is None else reference.grad_a(dh, matrix(x).to(a.dtype), dropout, seed)
    added = reference.expand(dh, a, None, dropout, seed).to(ctx.dtype).view(ctx.shape)
    return added if dx is None else dx + added, da


class Expand(torch.autograd.Function):
    """y = x Wᵀ + h Bᵀ + bias, for a W that has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        group: Group,
        factors: tuple[Tensor, ...],
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        h: Tensor,
        b: Tensor,
    ) -> Tensor:
        learn = any(a.requires_grad for a in factors)
        ctx.save_for_backward(w, h, b, x if learn else None, *factors)
        ctx.group, ctx.shape, ctx.ops = group, x.shape, dispatch.ops(x, h.dtype)
        y = ctx.ops.product(matrix(x), w.t(), h, b.to(h.dtype).t(), bias, 0.0, None)
        # a view of what is made in here couldn't be changed in place
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(w)))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        w, h, b, *ctx.group.brought = ctx.saved_tensors
        ctx.group.parts.clear()  # they hold x, which is let go of on the way back
        dy, b = matrix(grad), b.to(h.dtype)
        if torch.is_grad_enabled():
            dh, db = reference.grad_ab(dy.to(h.dtype), h, b)
        else:
            dh, db = ctx.ops.grad_ab(dy, h, b, 1.0, 0.0)
        for_x, _, for_bias, *_ = ctx.needs_input_grad[2:]
        dx = (dy @ w).view(ctx.shape) if for_x else None
        return None, None, dx, None, dy.sum(0) if for_bias else None, dh, db
