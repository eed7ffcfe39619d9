"""Base: all of a model's tensors from a checkpoint, packed ones as they are packed there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.site import walk
from peftlite.core.tensors import is_sharded
from peftlite.errors import FileError, PeftliteError
from peftlite.io.checkpoint import Checkpoint
from peftlite.quant import keys, others
from peftlite.quant.holder import hold, is_part, packings
from peftlite.quant.packing import Packing
from peftlite.table import listed


@dataclass(frozen=True)
class Place:
    """Where a model has one of its tensors: a tied one has several names and owners."""

    names: tuple[str, ...]
    owners: tuple[tuple[nn.Module, str], ...]
    tensor: Tensor

    @property
    def is_parameter(self) -> bool:
        module, slot = self.owners[0]
        return slot in module._parameters


def read(model: nn.Module, path: str | os.PathLike[str]) -> list[tuple[Place, Packing]]:
    """Fills a model with a checkpoint's tensors, all or none; returns those that are packed.

    What is on the meta device is made on the CPU, of the file's dtype; else the model's stays.

    Raises PeftliteError, and FileError where the file doesn't fit.
    """
    checkpoint = Checkpoint(path)
    _tie(model)
    places = _places(model)
    names = {name for place in places for name in place.names}
    computed = _computed(model)
    groups = _groups((key for key in checkpoint if key not in computed), names)
    _check_names(str(path), places, groups, checkpoint)
    found = [(place, *_found(checkpoint, place, groups)) for place in places]
    with torch.no_grad():
        for place, how, parts in found:
            _put(place, how, parts)
    return [(place, how) for place, how, _ in found if how is not None]


def _tie(model: Any) -> None:
    """Ties of tensors that were made anew on the meta device, as init_empty_weights makes them."""
    if hasattr(model, "tie_weights") and any(p.is_meta for p in model.parameters()):
        model.tie_weights()


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether a folder has tensors, some of which are packed as is known here."""
    try:
        return packed_key(Checkpoint(path)) is not None
    except FileError:
        return False


def packed_key(checkpoint: Iterable[str]) -> str | None:
    """The name of a part of a packed tensor; None if there is none."""
    found = (k for k in checkpoint if k.rpartition(".")[2] in others.NAMES or ".quant_state." in k)
    return next(found, None)


def _places(model: nn.Module) -> list[Place]:
    """The parameters and the persistent buffers of a model. Raises PeftliteError."""
    found: dict[int, tuple[list[str], dict[tuple[nn.Module, str], None], Tensor]] = {}
    for path, module in walk(model):
        kept = {s: b for s, b in module._buffers.items() if not is_part(module, s)}
        lost = [s for s in module._non_persistent_buffers_set if s in kept and kept[s] is not None]
        for slot in lost:
            if kept.pop(slot).is_meta:  # type: ignore
                raise PeftliteError(
                    f"{path}.{slot} is a buffer on the meta device that no checkpoint holds: build "
                    "the model so that parameters alone are there, as within "
                    "accelerate.init_empty_weights()"
                )
        for slot, tensor in {**module._parameters, **kept}.items():
            if tensor is None:
                continue
            address = f"{path}.{slot}" if path else slot
            if slot in packings(module) or is_sharded(tensor):
                raise PeftliteError(f"{address} is packed or sharded already: take a plain model")
            names, owners, _ = found.setdefault(id(tensor), ([], {}, tensor))
            names.append(address)
            owners[module, slot] = None
    return [Place(tuple(n), tuple(o), t) for n, o, t in found.values()]


def _computed(model: nn.Module) -> set[str]:
    """The names of what the model computes by itself, which an older one's file may have."""
    found = ((path, slot) for path, m in walk(model) for slot in m._non_persistent_buffers_set)
    return {f"{path}.{slot}".lstrip(".") for path, slot in found}


def _groups(keys: Iterable[str], names: set[str]) -> dict[str, dict[str, str]]:
    """The keys of each tensor of a model by what follows its name; of "" those of none."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        path, _, last = key.rpartition(".")
        name, rest = f"{path}.weight".lstrip("."), last
        if key in names or last not in others.NAMES | others.OF_INPUTS:
            name = key
            while name and name not in names:
                name = name.rpartition(".")[0]
            rest = key[len(name) + 1 :]
        if name not in names:
            name, rest = "", key
        if rest not in others.OF_INPUTS:
            found.setdefault(name, {})[rest] = key
    return found


def _check_names(path: str, places: list[Place], groups: Mapping, there: Iterable[str]) -> None:
    lacking = [p.names[0] for p in places if not any(name in groups for name in p.names)]
    if lacking:
        raise FileError(
            f"{path!r} lacks {len(lacking)} of the model's tensors: {listed(lacking)}; it has such "
            f"as {listed(sorted(there)[:2])}"
        )
    if "" in groups:
        raise FileError(
            f"{path!r} has {len(groups[''])} tensors that the model lacks: {listed(groups[''])}"
        )


def _found(
    checkpoint: Checkpoint, place: Place, groups: Mapping[str, Mapping[str, str]]
) -> tuple[Packing | None, dict[str, Tensor]]:
    """A tensor's packing, None if it has none, and its parts. Raises FileError."""
    name, *ties = [name for name in place.names if name in groups]
    own = {rest: checkpoint[key] for rest, key in groups[name].items()}
    for other in ties:
        for rest, key in groups[other].items():
            if rest not in own or not torch.equal(own[rest], checkpoint[key]):
                raise FileError(f"the model ties {other} to {name}, which the file has otherwise")
    how = None
    if [*own] != [""] or (place.tensor.is_floating_point() and not own[""].is_floating_point()):
        said = checkpoint.config.get("quantization_config", {})
        try:
            if any(rest.startswith("quant_state.") for rest in own):
                how, own = keys.read(own)
            else:
                how, own = others.read(own, place.tensor.shape, _dtype(checkpoint), said)
        except PeftliteError as error:
            raise FileError(f"{name} {error}") from error
    shape = tuple(own[""].shape if how is None else how.shape)
    if shape != tuple(place.tensor.shape) or (how is not None and not place.is_parameter):
        wanted = tuple(place.tensor.shape)
        raise FileError(f"{name} has shape {shape} in the file, and {wanted} in the model")
    return how, own


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """That of the first tensor that isn't packed: codes don't tell what they are read in."""
    plain = (key for key in checkpoint if key.rpartition(".")[2] not in others.NAMES)
    found = (checkpoint.entry(key).dtype for key in plain)
    return next((d for d in found if d.is_floating_point and d.itemsize > 1), torch.float32)


def _put(place: Place, how: Packing | None, parts: dict[str, Tensor]) -> None:
    like = place.tensor
    if not like.is_meta:
        parts = {name: part.to(like.device) for name, part in parts.items()}
    if how is not None:
        how = how if like.is_meta else how.cast(like.dtype)
        codes = nn.Parameter(parts[""], requires_grad=False)
        for module, slot in place.owners:
            hold(module, slot, how, codes, parts)
    elif not like.is_meta:
        like.copy_(parts[""])
    else:
        made = nn.Parameter(parts[""], like.requires_grad) if place.is_parameter else parts[""]
        for module, slot in place.owners:
            (module._parameters if place.is_parameter else module._buffers)[slot] = made
