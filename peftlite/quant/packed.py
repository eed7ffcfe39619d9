"""Packed: a tensor that is kept in codes, and formed by each operation for itself.

What an operation keeps of it for the backward pass is the codes: it is formed again there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from peftlite.kernels.workspace import workspace
from peftlite.lazy import Lazy
from peftlite.quant import beside, nf4
from peftlite.quant.packing import Packing, pack

_transforms = torch._C._functorch.maybe_current_level


class Packed(Lazy):
    """W, of which there are codes.

    Attributes:
        packing: how it is packed.
        parts: its codes, "", and their scales, by name.
    """

    kind = "packed"
    packing: Packing
    parts: Mapping[str, Tensor]

    @staticmethod
    def __new__(cls: type[Packed], packing: Packing, parts: Mapping[str, Tensor]) -> Packed:
        return Tensor._make_wrapper_subclass(
            cls, packing.shape, dtype=packing.dtype, device=parts[""].device
        )

    def __init__(self, packing: Packing, parts: Mapping[str, Tensor]):
        self.packing, self.parts = packing, parts

    def form(self) -> Tensor:
        if hasattr(self, "placements"):
            return _spread(self.full_tensor().form(), self.parts[""])
        return self.packing.unpack(self.parts)

    # -- what tells a tensor that is spread over processes, as its codes then are

    @property
    def placements(self) -> Any:
        return self.parts[""].placements

    @property
    def device_mesh(self) -> Any:
        return self.parts[""].device_mesh

    def full_tensor(self) -> Packed:
        """The same with all of its codes (every process has to ask)."""
        return self.each(_whole)

    def why_not_written(self) -> str:
        return f"is kept in {self.packing.kind}, whose codes it wouldn't reach: pl.dequantize first"

    def like(self, w: Tensor) -> Packed:
        """Another tensor of its shape, packed as it is."""
        how, double = self.packing, "nested_absmax" in self.parts
        low = {name: self.parts[name] for name in beside.PARTS if name in self.parts}
        w = _whole(w)
        rest = w - beside.add(low, w.new_zeros(w.shape)) if low else w
        _, parts = pack(rest, how.kind, how.block, double, how.search)
        return Packed(how, {**parts, **low, "": _spread(parts[""], self.parts[""])})

    def each(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """The same, with parts that are copied or moved."""
        return Packed(self.packing, {name: change(part) for name, part in self.parts.items()})

    def read_in(self, dtype: torch.dtype) -> Packed:
        """The same, of another dtype."""
        made = Packed(self.packing.cast(dtype), self.parts)
        made.source = self.source
        return made

    def write(self, other: Packed) -> None:
        """Takes over the codes of another one, packed alike."""
        for name, part in self.parts.items():
            part.copy_(other.parts[name])

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        named = {f"part_{name}": part for name, part in self.parts.items()}
        self.__dict__.update(named)
        return [*named], None

    @classmethod
    def compute(
        cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func is Tensor.detach:
            return args[0]
        if func is F.linear and not kwargs and not isinstance(args[0], cls):
            return _linear(*args)
        if func is F.embedding and (found := _looked_up(*args, **kwargs)) is not None:
            return found
        formed: list[tuple[Tensor, Packed]] = []

        def form(w: Packed) -> Tensor:
            formed.append((w.form(), w))
            return formed[-1][0]

        args, kwargs = tree_map_only(Packed, form, (args, kwargs))
        with _keeping_codes(formed):
            return func(*args, **kwargs)


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _spread(tensor: Tensor, like: Any) -> Tensor:
    """A tensor, spread over processes as another one is."""
    if not hasattr(like, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)


def _looked_up(
    ids: Tensor, w: Packed, *_: Any, max_norm: float | None = None, **__: Any
) -> Tensor | None:
    """The rows of w (n, d) at ids (…), formed by themselves; None where that can't be."""
    if max_norm is not None or ids.numel() >= len(w) or _transforms() is not None:
        return None
    found = w.packing.rows(w.parts, ids.reshape(-1))
    return None if found is None else found[0].unpack(found[1]).view(*ids.shape, -1)


def _linear(x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b: x (…, i), W (o, i), b (o,), y (…, o)."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if _transforms() is not None:
        return F.linear(x, w.packing.cast(x.dtype).unpack(w.parts), bias)
    if w.packing.kind == "nf4" and not torch.is_grad_enabled():
        if (y := nf4.product(x, w.parts, w.packing.block, bias)) is not None:
            return y
    y: Any = _Linear.apply(x, bias, w.packing, w.parts)
    return y


class _Linear(torch.autograd.Function):
    """x Wᵀ + b. It keeps nothing but the codes, which are there anyway; so does the next."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, packing: Packing, parts: Mapping[str, Tensor]
    ) -> Tensor:
        ctx.packed = packing, parts
        packing = packing.cast(x.dtype)
        y = packing.product(x, parts, bias)
        return F.linear(x, _formed(packing, parts), bias) if y is None else y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        of_x, of_bias, *_ = ctx.needs_input_grad
        dx: Any = _Back.apply(dy, *ctx.packed) if of_x else None
        return dx, dy.reshape(-1, dy.shape[-1]).sum(0) if of_bias else None, None, None


class _Back(torch.autograd.Function):
    """dy W."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, packing: Packing, parts: Mapping[str, Tensor]) -> Tensor:
        ctx.packed = packing, parts
        packing = packing.cast(dy.dtype)
        dx = packing.back(dy, parts)
        return dy @ _formed(packing, parts) if dx is None else dx

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, None, None]:
        (ddx,) = grad_outputs
        return _Linear.apply(ddx, None, *ctx.packed), None, None


def _formed(packing: Packing, parts: Mapping[str, Tensor]) -> Tensor:
    """W in this thread's workspace, until the next product."""
    return packing.unpack(parts, workspace("W", packing.shape, packing.dtype, parts[""].device))


def _keeping_codes(formed: list[tuple[Tensor, Packed]]) -> Any:
    """A `with` in which autograd keeps the codes of tensors in their place.

    What else is kept goes to whoever asks for it already, as checkpointing does.
    """
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def keep(t: Tensor) -> Callable[[], Tensor]:
        storage = t.untyped_storage()._cdata
        for w, packed in formed:
            if w.untyped_storage()._cdata == storage:
                how = t.size(), t.stride(), t.storage_offset()
                return lambda: packed.form().as_strided(*how)
        if outer is None:
            return lambda: t
        kept, unpack = outer[0](t), outer[1]
        return lambda: unpack(kept)

    return torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept())
