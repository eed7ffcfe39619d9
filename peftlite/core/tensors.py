"""Tensors: parts of one, shards of one, the dtype to compute in, and how far two are apart."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from peftlite.quant import others
from peftlite.quant.holder import ATTRIBUTE as PACKED
from peftlite.quant.holder import packed
from peftlite.quant.packed import Packed

Index: TypeAlias = "tuple[int, int, int] | None"
"""A part of a tensor, as `(dim, start, stop)`; all of it if None."""


def raw(module: Any, slot: str) -> Tensor:
    """The tensor in a slot as the base has it, patched or not, packed or parametrized or not."""
    tensor = module._parameters.get(slot)
    if PACKED in module.__dict__ and slot in module.__dict__[PACKED]:
        return packed(module, slot)
    if slot == "weight" and (type(tensor) is not nn.Parameter or tensor.itemsize == 1):
        if others.hidden(module):
            return others.packed(module)
    if tensor is None:
        tensor = module._buffers.get(slot)
    if tensor is None:  # made by a parametrization, or by a hook of the older kind
        made = parametrize.is_parametrized(module, slot)
        tensor = module.parametrizations[slot]() if made else getattr(module, slot)
    return tensor


def narrow(tensor: Tensor, index: Index) -> Tensor:
    """The part of a tensor at an index, sharing its memory."""
    if index is None:
        return tensor
    dim, start, stop = index
    return tensor.narrow(dim, start, stop - start)


def widen(left: Tensor, right: Tensor, index: Index, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The factors (*stack, n, r) and (*stack, r, m) of a change to a part, as of one to all."""
    if index is None:
        return left, right
    dim, start, stop = index
    if left.dim() > 2:  # some matrices of a stack
        pad = (*(0, 0) * (left.dim() - 1), start, shape[0] - stop)
        return F.pad(left, pad), F.pad(right, pad)
    if dim == 0:
        return F.pad(left, (0, 0, start, shape[0] - stop)), right
    return left, F.pad(right, (start, shape[1] - stop))


def overlap(a: Index, b: Index) -> bool:
    """Whether two parts of a tensor share entries."""
    return a is None or b is None or a[0] != b[0] or (a[1] < b[2] and b[1] < a[2])


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute a change in, so that W' is rounded once: the widest, fp32 at least.

    The tensors may be of any shape.

    Example:
        assert pl.methods.wide(torch.zeros(2, dtype=torch.bfloat16)) is torch.float32
    """
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def distance(a: Tensor, b: Tensor) -> float:
    """max |a − b| of tensors of any shape, in pieces that fit a cache; 0 without entries."""
    if not a.numel():
        return 0.0
    pieces = [(a, b)]
    if a.dim() and not is_sharded(a):
        step = max(1, len(a) * 2**18 // a.numel())
        pieces = zip(a.split(step), b.split(step), strict=True)
    dtype = wide(a, b)
    found = [(x.to(dtype) - y.to(dtype)).abs().max() for x, y in pieces]
    return torch.stack(found).max().item()


# -- tensors that are spread over processes


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, spread over processes; without importing what that is."""
    return hasattr(tensor, "placements")


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor holds codes in place of numbers: by its dtype, or by a class of its own."""
    numbers = tensor.is_floating_point() or tensor.is_complex()
    if isinstance(tensor, Packed) or not numbers:
        return True
    return hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor)


def copied(tensor: Tensor) -> Tensor:
    """A copy; of a packed one it is packed, too."""
    return tensor.each(Tensor.clone) if isinstance(tensor, Packed) else tensor.detach().clone()


def placed(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device, packed if it was."""
    if isinstance(tensor, Packed):
        return tensor.each(lambda part: part.to(device))
    return tensor.to(device)


def as_stored(value: Tensor, like: Tensor) -> Tensor:
    """A value as it is kept where `like` is: packed, if that is."""
    if isinstance(like, Packed) and not isinstance(value, Packed):
        return like.like(value)
    return value


@torch.no_grad()
def write(tensor: Tensor, value: Tensor) -> None:
    """Gives a tensor of the base another value."""
    if isinstance(tensor, Packed):
        tensor.write(as_stored(value, tensor))
    else:
        tensor.copy_(value)


def bytes_in(tensor: Tensor) -> int:
    """Bytes that a tensor takes, as it is kept."""
    return sum(part.nbytes for part in plain_parts(tensor))


def is_opaque(tensor: Tensor) -> bool:
    """Whether a tensor holds codes that only its own class can multiply with."""
    return is_quantized(tensor) and not isinstance(tensor, Packed)


def plain_parts(tensor: Any) -> list[Tensor]:
    """The plain tensors that one is made of: itself, or the codes and scales of a quantised one."""
    coded = hasattr(tensor, "__tensor_flatten__") and is_quantized(tensor)
    if not coded or (is_sharded(tensor) and not isinstance(tensor, Packed)):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in plain_parts(getattr(tensor, name))]


def unshard(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded over processes (every one of them has to ask)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor, sharded as another one is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is in this process."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
