"""Packing: a delta's parameters in less space, with an error that the file states.

bf16    the nearest bfloat16
int8    q·s, with q in -127 … 127 and one s for each row (all but the last dimension), `key#scale`
sparse  the values that aren't zero, and `key#at`, their flat indices; exact

What a file says of each packed tensor: {"as": "int8", "dtype": "float32", "shape": [8, 16],
"error": 0.003}, the error being the largest of any value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from peftlite.io.files import Entry, numel

Packing = Literal["bf16", "int8", "sparse"]
PACKINGS = get_args(Packing)
_EXTRA = {"int8": "scale", "sparse": "at"}

About = Mapping[str, dict[str, Any]]


def pack(
    tensors: Mapping[str, Tensor], how: str | None
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors as they are stored, and what to say of those that are packed.

    What isn't floating-point, and what packing would make no smaller, stays as it is.
    """
    stored, about = dict(tensors), {}
    for key, tensor in tensors.items() if how else ():
        if not tensor.is_floating_point() or tensor.dim() == 0 or not tensor.numel():
            continue
        parts = _PACK[how](tensor)
        if sum(part.nbytes for part in parts) >= tensor.nbytes:
            continue
        back = _unpack(how, parts, tensor.dtype, tensor.shape)
        error = (back.double() - tensor.double()).abs().max().item()
        dtype = str(tensor.dtype).removeprefix("torch.")
        about[key] = {"as": how, "dtype": dtype, "shape": [*tensor.shape], "error": error}
        stored |= zip(_keys(key, how), parts, strict=True)
    return stored, about


def unpack(key: str, about: About, get: Callable[[str], Tensor]) -> Tensor:
    """The values of a tensor, packed or not. Raises ValueError."""
    if key not in about:
        return get(key)
    its = about[key]
    parts = [get(part) for part in _keys(key, its["as"])]
    return _unpack(its["as"], parts, getattr(torch, its["dtype"]), its["shape"])


def unpacked(stored: Mapping[str, Entry], about: About) -> dict[str, Entry]:
    """What stored entries unpack to."""
    parts = {part for key, its in about.items() for part in _keys(key, its["as"])}
    found = {key: entry for key, entry in stored.items() if key not in parts}
    packed = {k: Entry(getattr(torch, a["dtype"]), tuple(a["shape"])) for k, a in about.items()}
    return {**found, **packed}


def is_sound(key: str, its: Any, stored: Mapping[str, Entry]) -> bool:
    """Whether what a file says of a packed tensor can be, going by what it holds."""
    match its:
        case {"as": str(how), "dtype": str(name), "shape": list(shape), "error": float(error)}:
            dtype = getattr(torch, name, None)
        case _:
            return False
    if how not in PACKINGS or not 0 <= error < math.inf or not all(type(n) is int for n in shape):
        return False
    if (
        not isinstance(dtype, torch.dtype)
        or not dtype.is_floating_point
        or min(shape, default=0) < 0
    ):
        return False
    parts = [stored.get(part) for part in _keys(key, how)]
    match how:
        case "bf16":
            fitting = [Entry(torch.bfloat16, tuple(shape))]
        case "int8":
            fitting = [
                Entry(torch.int8, tuple(shape)), Entry(torch.float32, (*shape[:-1], 1))
            ]  # fmt: skip
        case _:
            count = parts[0].shape if parts[0] and len(parts[0].shape) == 1 else (-1,)
            fitting = [Entry(dtype, count), Entry(_index(shape), count)]
    return parts == fitting


def _keys(key: str, how: str) -> list[str]:
    """Under what a packed tensor is stored."""
    return [key, f"{key}#{_EXTRA[how]}"] if how in _EXTRA else [key]


def _int8(tensor: Tensor) -> list[Tensor]:
    wide = tensor.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    q = (wide / scale.where(scale > 0, torch.ones_like(scale))).round().clamp(-127, 127)
    return [q.to(torch.int8), scale]


def _sparse(tensor: Tensor) -> list[Tensor]:
    flat = tensor.reshape(-1)
    indices = flat.nonzero()[:, 0]
    return [flat[indices], indices.to(_index(tensor.shape))]


def _index(shape: Any) -> torch.dtype:
    return torch.int32 if numel(shape) <= torch.iinfo(torch.int32).max else torch.int64


_PACK: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "bf16": lambda tensor: [tensor.bfloat16()],
    "int8": _int8,
    "sparse": _sparse,
}


def _unpack(how: str, parts: list[Tensor], dtype: torch.dtype, shape: Any) -> Tensor:
    match how:
        case "bf16":
            return parts[0].to(dtype)
        case "int8":
            return (parts[0].float() * parts[1]).to(dtype)
    values, indices = parts
    if len(indices) and not 0 <= indices.min() <= indices.max() < numel(shape):
        raise ValueError("an index is out of its tensor")
    return values.new_zeros(numel(shape)).index_put((indices.long(),), values).reshape(shape)
