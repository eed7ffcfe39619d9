"""Holder: a module that keeps some of its tensors in codes, and reads them as what they are.

Its class is swapped for a subclass with a property for each such slot. The codes stand where the
tensor stood, as a parameter of integers that takes no gradient, and their scales are buffers
beside it; so they move, shard, copy and save as any model's tensors do.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from peftlite.errors import PeftliteError
from peftlite.quant import compiled, keys
from peftlite.quant.packed import Packed
from peftlite.quant.packing import Packing, pack

ATTRIBUTE = "peftlite_packed"
_BESIDE = "__"  # weight__absmax: torch takes a name with a dot for one in a module


def packings(module: nn.Module) -> dict[str, Packing]:
    """How the slots of a module are packed that are."""
    return module.__dict__.get(ATTRIBUTE) or {}


def packed(module: nn.Module, slot: str) -> Tensor:
    """The tensor in a slot that is kept in codes: formed at once where it is to be compiled."""
    how, parts = packings(module)[slot], _parts(module, slot)
    return compiled.unpack(how, parts) if torch.compiler.is_compiling() else Packed(how, parts)


def _parts(module: nn.Module, slot: str) -> dict[str, Tensor]:
    start = f"{slot}{_BESIDE}"
    beside = {n.removeprefix(start): b for n, b in module._buffers.items() if n.startswith(start)}
    return {"": module._parameters[slot], **beside}  # type: ignore


def is_part(module: nn.Module, buffer: str) -> bool:
    """Whether a buffer belongs to a tensor in codes."""
    return buffer.partition(_BESIDE)[0] in packings(module)


def numbers(root: nn.Module, parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers parameters of a model hold, codes counted as what they stand for."""
    shapes = {
        id(module._parameters[slot]): how.shape
        for module in root.modules()
        for slot, how in packings(module).items()
    }
    return sum(shapes.get(id(p), p.shape).numel() for p in parameters)


def hold(
    module: nn.Module, slot: str, how: Packing, codes: nn.Parameter, parts: Mapping[str, Tensor]
) -> None:
    """Puts codes and their scales in a slot, which is read as the tensor from then on."""
    module._parameters[slot] = codes
    for name, part in sorted(parts.items()):  # a fingerprint goes by their order
        if name:
            module._buffers[f"{slot}{_BESIDE}{name}"] = part
    module.__dict__[ATTRIBUTE] = {**packings(module), slot: how}
    module.__class__ = _holder_class(_plain_class(module), frozenset(packings(module)))


def release(module: nn.Module, slot: str, tensor: nn.Parameter) -> None:
    """Puts a tensor back where its codes are."""
    for name in [name for name in module._buffers if name.startswith(f"{slot}{_BESIDE}")]:
        del module._buffers[name]
    module._parameters[slot] = tensor
    left = {name: how for name, how in packings(module).items() if name != slot}
    base = _plain_class(module)
    module.__dict__[ATTRIBUTE] = left
    module.__class__ = _holder_class(base, frozenset(left)) if left else base
    if not left:
        del module.__dict__[ATTRIBUTE]


def _plain_class(module: nn.Module) -> type:
    return type(module)._packs[0] if isinstance(module, Holder) else type(module)


class Holder:
    """What a swapped class adds."""

    _packs: tuple[type, frozenset[str]]

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and name in packings(self) and not self._takes(name, value):
            raise PeftliteError(
                f"{name!r} of a {type(self).__name__} is packed, and no tensor can be put in its "
                "place: pl.dequantize the model first"
            )
        super().__setattr__(name, value)

    def _takes(self, slot: str, value: Tensor) -> bool:
        """Whether a tensor is codes, as there are: FSDP2 spreads and gathers them."""
        codes: Any = self._parameters[slot]
        alike = (value.dtype, value.shape) == (codes.dtype, codes.shape)
        return alike and isinstance(value, nn.Parameter)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {name: b for name, b in self._buffers.items() if is_part(self, name)}
        super()._apply(fn, recurse)
        # a change of dtype is one of what is read: the scales stay what they are
        for name, buffer in before.items():
            now = self._buffers[name]
            self._buffers[name] = now.to(buffer.dtype) if buffer.is_meta else buffer.to(now.device)
        for slot, how in [*packings(self).items()]:
            packings(self)[slot] = how.cast(fn(torch.empty(0, dtype=how.dtype)).dtype)
        return self

    def _set_aside(self) -> dict[str, Tensor]:
        names = [name for name in self._buffers if is_part(self, name)]
        return {name: self._buffers.pop(name) for name in names}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        own = self._set_aside()
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._buffers.update(own)
        for slot, how in packings(self).items():
            for name, part in keys.written(how, _parts(self, slot)).items():
                if name:
                    destination[f"{prefix}{slot}.{name}"] = part if keep_vars else part.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        inside = {key: key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
        named = {key: name.partition(".") for key, name in inside.items()}
        own = {key: parts for key, parts in named.items() if parts[0] in packings(self)}
        rest = {key: value for key, value in state_dict.items() if key not in own}
        aside = self._set_aside()
        missing: list[str] = []
        try:
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
            )
        finally:
            self._buffers.update(aside)
        for slot in packings(self):
            given = {n: state_dict[key] for key, (name, _, n) in own.items() if name == slot}
            if not given:
                continue
            missing = [key for key in missing if key != prefix + slot]
            try:
                self._take(slot, given)
            except PeftliteError as error:
                error_msgs.append(f"{prefix}{slot} {error}")
        missing_keys += missing

    def _take(self, slot: str, given: Mapping[str, Tensor]) -> None:
        """Copies a state dict's entries into a slot: codes, or a tensor to be coded."""
        how, parts = packings(self)[slot], _parts(self, slot)
        if not all(isinstance(part, Tensor) for part in given.values()):
            raise PeftliteError("has entries that are no tensors")
        if [*given] == [""] and given[""].is_floating_point():
            if not given[""].isfinite().all():
                raise PeftliteError("has numbers that aren't finite")
            double = "nested_absmax" in parts
            theirs, new = pack(given[""], how.kind, how.block, double, how.search)
        else:
            theirs, new = keys.read(given)
        if (theirs.cast(how.dtype), new.keys()) != (how, parts.keys()):
            raise PeftliteError(f"is {theirs} of {[*new]}, where here is {how} of {[*parts]}")
        with torch.no_grad():
            for name, part in parts.items():
                part.copy_(new[name])


class _Kind(type):
    """The class of holders' classes, which are made anew where a pickle or a copy is read."""


_classes: WeakValueDictionary[tuple, type] = WeakValueDictionary()


def _holder_class(base: type, slots: frozenset[str]) -> type:
    """A subclass of `base` that reads `slots` from codes; one each, so graphs are shared."""
    made = _classes.get((id(base), slots))
    if made is not None:
        return made
    kind = _Kind
    if type(base) is not type:
        kind = type("_Kind", (_Kind, type(base)), {})
        copyreg.pickle(kind, _reduced)
    body: dict[str, Any] = {"_packs": (base, slots), "__module__": base.__module__}
    body |= {slot: property(lambda self, slot=slot: _read(self, slot)) for slot in slots}
    if issubclass(base, nn.RNNBase):  # which keeps its tensors in a list, too
        body["_flat_weights"] = property(_flat_weights, lambda self, _: None)
    made = kind(base.__name__, (Holder, base), body)
    made.__qualname__ = base.__qualname__
    return _classes.setdefault((id(base), slots), made)


def _read(module: nn.Module, slot: str) -> Any:
    codes = module._parameters[slot]
    return codes if hasattr(codes, "placements") else packed(module, slot)


def _flat_weights(module: Any) -> list[Any]:
    found = (getattr(module, name, None) for name in module._flat_weights_names)
    return [w.form() if isinstance(w, Packed) else w for w in found]


def _reduced(made: Any) -> tuple:
    return _holder_class, made._packs


copyreg.pickle(_Kind, _reduced)
