"""merge and unmerge: a delta written into the base, with the way back exact to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from peftlite.attach import Registry, changeable, remove, require
from peftlite.choice import Names
from peftlite.delta import Delta
from peftlite.errors import PeftliteError
from peftlite.patch import Patch, apply
from peftlite.site import Site, walk, whole_address
from peftlite.table import few, size, table

Backup = Literal["device", "host", "none"]


@dataclass(frozen=True)
class Receipt:
    """What a merge did: per tensor, the largest change of an entry; and the bytes kept for unmerge.

    Attributes:
        name: the delta's.
        max_change: max |W' − W| by address.
        bytes_kept: of the base's own weights, for the way back.
    """

    name: str
    max_change: dict[str, float]
    bytes_kept: int

    def __str__(self) -> str:
        rows = [[address, f"{change:.3g}"] for address, change in self.max_change.items()]
        head = f"merged {self.name!r}, keeping {size(self.bytes_kept)} for the way back"
        return f"{head}\n{table(['tensor', 'max |change|'], rows)}"


@dataclass
class Merged:
    """One delta in the base. The registry holds these in the order of merging."""

    delta: Delta
    touched: dict[str, tuple[Site, list[Patch]]]
    standing: Names

    def undo(self, registry: Registry) -> None:
        """Writes the base as it is without this delta: from the originals, not by subtraction."""
        del registry.merged[self.delta.name]
        self.delta.merged_in = None
        for address, (where, _) in self.touched.items():
            _write(where.whole, base_tensor(registry, address, where))
            if not any(address in other.touched for other in registry.merged.values()):
                del registry.originals[address]


def base_tensor(registry: Registry, address: str, where: Site, but: Delta | None = None) -> Tensor:
    """A tensor of the base with the merged deltas in it, all or all but one."""
    w = registry.originals[address].to(where.whole.device)
    for merged in registry.merged.values():
        if merged.delta is not but and address in merged.touched:
            w = _applied(merged.touched[address][1], w)
    return w


def merge(model: nn.Module, name: str, *, backup: Backup = "device") -> Receipt:
    """W ← W' for every tensor of a delta, which is then on in the base and no longer chosen.

    Everything is computed and checked before anything is written. Half-precision weights are
    rounded once, from the patch's wider dtype.

    Args:
        backup: where the base's own weights are kept for `unmerge`: on their "device", on the
            "host", or "none": then the merge is for good, and the delta is taken off the model.

    Raises:
        PeftliteError: the delta changes calls, a weight would not be finite, or the model is on
            the meta device. The model is as it was.
    """
    root, registry = require(model, name)
    changeable(registry)
    delta = registry.deltas[name]
    touched = _mergeable(root, registry, delta, backup)
    values, originals = {}, {}
    for address, (where, patches) in touched.items():
        values[address] = _applied(patches, where.whole)
        if values[address].shape != where.whole.shape:
            raise PeftliteError(
                f"the value of {address} came out as {tuple(values[address].shape)}, not "
                f"{tuple(where.whole.shape)}: a patch's value keeps the shape"
            )
        if not values[address].isfinite().all():
            raise PeftliteError(
                f"merging {name!r} would make {address} infinite or NaN; nothing was merged"
            )
        if backup != "none" and address not in registry.originals:
            originals[address] = where.whole.detach().to(
                "cpu" if backup == "host" else where.whole.device, copy=True
            )
    change = {
        address: (values[address].double() - where.whole.double()).abs().max().item()
        for address, (where, _) in touched.items()
        if where.whole.numel()
    }
    for address, (where, _) in touched.items():
        _write(where.whole, values[address])
    if backup == "none":
        remove(root, registry, name)
    else:
        registry.originals.update(originals)
        delta.merged_in = registry
        registry.merged[name] = Merged(delta, touched, registry.choice.standing)
        registry.choice.standing = tuple(n for n in registry.choice.standing if n != name)
    return Receipt(name, change, sum(tensor.nbytes for tensor in originals.values()))


def unmerge(model: nn.Module, name: str) -> None:
    """Takes a merged delta out of the base again, exact to the bit, whatever was merged since.

    The delta is chosen again if it was when it was merged. Raises PeftliteError.
    """
    _, registry = require(model, name)
    changeable(registry)
    if name not in registry.merged:
        raise PeftliteError(f"{name!r} is not merged; merged are: {few(registry.merged) or 'none'}")
    record = registry.merged[name]
    record.undo(registry)
    if name in record.standing:
        now = registry.choice.standing
        before = [n for n in record.standing if n == name or n in now]
        registry.choice.standing = (*before, *(n for n in now if n not in before))


def _mergeable(
    root: nn.Module, registry: Registry, delta: Delta, backup: str
) -> dict[str, tuple[Site, list[Patch]]]:
    """What a delta writes to, once nothing speaks against it."""
    name = delta.name
    if backup not in ("device", "host", "none"):
        raise PeftliteError(f"backup must be 'device', 'host' or 'none', not {backup!r}")
    if name in registry.merged:
        raise PeftliteError(f"{name!r} is merged already: pl.unmerge it first")
    if calls := [a for a, placed in delta.placed.items() if not placed.patch.has_value]:
        raise PeftliteError(
            f"{name!r} changes calls, which no weight can hold: {calls[0]} ({len(calls)} sites); "
            "keep it attached"
        )
    if any(name in choice.standing for choice in registry.views):
        raise PeftliteError(
            f"{name!r} is chosen by a view, which would apply it twice: delete the view first"
        )
    holders: dict[int, set[tuple[int, str]]] = {}
    for _, module in walk(root):
        for slot, tensor in module._parameters.items():
            holders.setdefault(id(tensor), set()).add((id(module), slot))
    for address, placed in delta.placed.items():
        placed.check()
        owners = {(id(module), slot) for module, slot in placed.site.owners}
        stored = placed.site.slot in placed.site.module._parameters
        if stored and holders.get(id(placed.site.whole)) != owners:
            raise PeftliteError(
                f"{address} was replaced, or tied to another, since {name!r} was attached: "
                "pl.detach it, and attach to the model as it is now"
            )
    touched = _by_tensor(delta)
    for address, (where, _) in touched.items():
        if where.whole.is_meta:
            raise PeftliteError(f"{address} is on the meta device and has no values to merge into")
        if where.slot not in where.module._parameters:
            raise PeftliteError(
                f"{address} is computed by a parametrization, not stored: remove it first with "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
        if backup == "none" and address in registry.originals:
            raise PeftliteError(f"{address} holds another merged delta: unmerge that first")
    return touched


def _by_tensor(delta: Delta) -> dict[str, tuple[Site, list[Patch]]]:
    """The patches of a delta by whole tensor, the parts of one together."""
    found: dict[str, tuple[Site, list[Patch]]] = {}
    for address, placed in delta.placed.items():
        found.setdefault(whole_address(address), (placed.site, []))[1].append(placed.patch)
    return found


@torch.no_grad()
def _applied(patches: list[Patch], w: Tensor) -> Tensor:
    """A tensor with patches in it as they are at inference: no dropout, no autocast."""
    training = [patch.training for patch in patches]
    try:
        for patch in patches:
            patch.eval()
        with torch.autocast(w.device.type, enabled=False):
            return apply(patches, w)
    finally:
        for patch, mode in zip(patches, training, strict=True):
            patch.train(mode)


@torch.no_grad()
def _write(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value)
