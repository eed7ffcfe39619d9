"""merge and unmerge: a delta written into the base, with the way back exact to the bit."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from peftlite.core.attach import Registry, changeable, remove, require, restoring
from peftlite.core.choice import Names
from peftlite.core.delta import Delta, gather, scatter
from peftlite.core.patch import Patch, apply, wide
from peftlite.core.residual import Residual, residual
from peftlite.core.site import Site, is_sharded, walk, whole_address
from peftlite.errors import PeftliteError
from peftlite.fields import check_given
from peftlite.table import few, size, table

Backup = Literal["device", "host", "residual", "none"]


@dataclass(frozen=True)
class Receipt:
    """What a merge did to every tensor that it changed, by address.

    Attributes:
        name: the delta's.
        max_change: max |W' − W|.
        rounding: max |W' − (W + ΔW)| against W + ΔW in fp64, which is what storing W' in its dtype
            has lost; empty where it wasn't measured.
        bytes_kept: of the base's own values, for the way back; 0 where they were kept already, and
            empty where there is none.
    """

    name: str
    max_change: dict[str, float]
    rounding: dict[str, float]
    bytes_kept: dict[str, int]

    def __str__(self) -> str:
        columns = {
            "tensor": list(self.max_change),
            "max |change|": [f"{change:.3g}" for change in self.max_change.values()],
            "rounding": [f"{loss:.3g}" for loss in self.rounding.values()],
            "kept": [size(count) for count in self.bytes_kept.values()],
        }
        shown = {what: cells for what, cells in columns.items() if cells}
        kept = f"keeping {size(sum(self.bytes_kept.values()))} for the way back"
        head = f"merged {self.name!r}, {kept if self.bytes_kept else 'for good'}"
        return f"{head}\n{table([*shown], [*zip(*shown.values(), strict=True)])}"


@dataclass
class Merged:
    """One delta in the base. The registry holds these in the order of merging."""

    delta: Delta
    touched: dict[str, tuple[Site, list[Patch]]]
    standing: Names

    @contextlib.contextmanager
    def undone(self, registry: Registry) -> Iterator[None]:
        """Writes the base as it is without this delta: from the originals, not by subtraction.

        If the body fails, the weights are as they were.
        """
        tensors = {address: where.whole for address, (where, _) in self.touched.items()}
        values = {
            address: base_tensor(registry, where, but=self.delta)
            for address, (where, _) in self.touched.items()
        }
        others = [merged for merged in registry.merged.values() if merged is not self]
        with _written(tensors, values) as before:
            kept = {**registry.originals, **_moved(registry, tensors, before)}
            wanted = {address for merged in others for address in merged.touched}
            registry.originals = {a: held for a, held in kept.items() if a in wanted}
            del registry.merged[self.delta.name]
            self.delta.merged_in = None
            yield


def base_tensor(registry: Registry, where: Site, but: Delta | None = None) -> Tensor:
    """A tensor of the base with the merged deltas in it, all or all but one."""
    address = first_name(where)
    w = original(registry, address, where.whole)
    for merged in registry.merged.values():
        if merged.delta is not but and address in merged.touched:
            w = applied(merged.touched[address][1], w)
    return w


def merge(model: nn.Module, name: str, *, backup: Backup = "device") -> Receipt:
    """W ← W' for every tensor of a delta, which is then on in the base and no longer chosen.

    Everything is computed and checked before anything is written, and a failure after that is taken
    back. Half-precision weights are rounded once, from the patch's wider dtype. While it runs there
    are two of every tensor that changes, and one of them at a time in fp64.

    Args:
        backup: how the base's own values are kept for `unmerge`: a copy of each tensor, on its
            "device" or on the "host"; "residual": on the host, compressed, what tells it from W'
            as it stands, or a copy where that is smaller; or "none": then the merge is for good,
            and the delta is taken off the model. A residual has measured 20 to 55 % of a copy in
            bf16 and 60 to 80 % in fp32, at some 40 MB/s; the smaller the change, the less. Of a
            sparse one it is the entries that change. From it `unmerge` refuses where the weights
            were written to since, which a copy overrules.

    Raises:
        PeftliteError: the delta changes calls, a weight would not be finite, or the model is on
            the meta device. The model is as it was.
    """
    root, registry = require(model, name)
    changeable(registry)
    delta = registry.deltas[name]
    touched = _mergeable(root, registry, delta, backup)
    tensors = {address: where.whole for address, (where, _) in touched.items()}
    values, change, rounding = {}, {}, {}
    for address, (_, patches) in touched.items():
        w = tensors[address]
        values[address], change[address] = checked(name, address, patches, w)
        rounding[address] = distance(values[address], applied(patches, w.double()))
    kept: dict[str, Tensor | Residual] = {}
    with restoring(root, registry), _written(tensors, values) as before:
        moved = _moved(registry, tensors, before)
        if backup == "none":
            remove(root, registry, name)
        else:
            for address in tensors.keys() - registry.originals.keys():
                kept[address] = _kept(before.pop(address), tensors[address], backup)
            registry.originals |= {**moved, **kept}
            delta.merged_in = registry
            registry.merged[name] = Merged(delta, touched, registry.choice.standing)
            registry.choice.standing = tuple(n for n in registry.choice.standing if n != name)
        bytes_kept = {a: kept[a].nbytes if a in kept else 0 for a in tensors if backup != "none"}
        return Receipt(name, change, rounding, bytes_kept)


def checked(name: str, address: str, patches: Sequence[Patch], w: Tensor) -> tuple[Tensor, float]:
    """A delta's value of a tensor, fit to stand for it, and max |W' − W|. Raises PeftliteError."""
    value = applied(patches, w)
    if value.shape != w.shape:
        raise PeftliteError(
            f"the value of {address} came out as {tuple(value.shape)}, not {tuple(w.shape)}: a "
            "patch's value keeps the shape"
        )
    change = distance(value, w)
    # a value that isn't finite shows in the change, so few are looked at twice
    if not math.isfinite(change) and not value.isfinite().all():
        raise PeftliteError(
            f"merging {name!r} would make {address} infinite or NaN; nothing was merged"
        )
    return value, change


def unmerge(model: nn.Module, name: str) -> None:
    """Takes a merged delta out of the base again, exact to the bit, whatever was merged since.

    The delta is chosen again if it was when it was merged. Raises PeftliteError; the model is then
    as it was.
    """
    root, registry = require(model, name)
    changeable(registry)
    if name not in registry.merged:
        raise PeftliteError(f"{name!r} is not merged; merged are: {few(registry.merged) or 'none'}")
    record = registry.merged[name]
    with restoring(root, registry), record.undone(registry):
        if name in record.standing:
            now = registry.choice.standing
            before = [n for n in record.standing if n == name or n in now]
            registry.choice.standing = (*before, *(n for n in now if n not in before))


def _mergeable(
    root: nn.Module, registry: Registry, delta: Delta, backup: str
) -> dict[str, tuple[Site, list[Patch]]]:
    """What a delta writes to, once nothing speaks against it."""
    name = delta.name
    check_given("backup", backup, get_args(Backup))
    if name in registry.merged:
        raise PeftliteError(f"{name!r} is merged already: pl.unmerge it first")
    refuse_calls(delta)
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
    touched = by_tensor(delta)
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


def refuse_calls(delta: Delta) -> None:
    """Raises PeftliteError if a delta changes more than tensors."""
    if calls := [a for a, placed in delta.placed.items() if not placed.patch.has_value]:
        raise PeftliteError(
            f"{delta.name!r} changes calls, which no weight can hold: {calls[0]} ({len(calls)} "
            "sites); keep it attached"
        )


def by_tensor(delta: Delta) -> dict[str, tuple[Site, list[Patch]]]:
    """The patches of a delta by whole tensor, the parts of one together."""
    found: dict[str, tuple[Site, list[Patch]]] = {}
    for placed in delta.placed.values():
        found.setdefault(first_name(placed.site), (placed.site, []))[1].append(placed.patch)
    return found


def first_name(where: Site) -> str:
    """What the whole tensor at a site goes by, whichever of its names a file had."""
    return whole_address(where.names[0])


@torch.no_grad()
def applied(patches: Sequence[Patch], w: Tensor) -> Tensor:
    """A tensor with patches in it as they are at inference: no dropout, no autocast."""
    training = [patch.training for patch in patches]
    try:
        for patch in patches:
            patch.eval()
        with torch.autocast(w.device.type, enabled=False):
            parameters = (p for patch in patches for p in patch.parameters())
            if not is_sharded(w) or any(map(is_sharded, parameters)):
                return apply(patches, w)
            return scatter(apply(patches, gather(w)), w)
    finally:
        for patch, mode in zip(patches, training, strict=True):
            patch.train(mode)


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of two entries, looked for in pieces that fit into a cache."""
    if not a.numel():
        return 0.0
    pieces = [(a, b)]
    if a.dim() and not is_sharded(a):
        step = max(1, len(a) * 2**18 // a.numel())
        pieces = zip(a.split(step), b.split(step), strict=True)
    dtype = wide(a, b)
    found = [(x.to(dtype) - y.to(dtype)).abs().max() for x, y in pieces]
    return torch.stack(found).max().item()


@contextlib.contextmanager
def _written(
    tensors: Mapping[str, Tensor], values: dict[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Gives every tensor its value, and the body what they were; takes it all back if that fails.

    The values are let go one by one, so that a tensor is there twice, not three times.
    """
    before: dict[str, Tensor] = {}
    try:
        for address, tensor in tensors.items():
            before[address] = tensor.detach().clone()
            _write(tensor, values.pop(address))
        yield dict(before)
    except BaseException:
        for address, held in before.items():
            _write(tensors[address], held)
        raise


@torch.no_grad()
def _write(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value)


# -- the way back


def _kept(w: Tensor, now: Tensor, backup: str) -> Tensor | Residual:
    """The base's own values of a tensor, beside those it has now."""
    if backup == "device":
        return w
    if backup == "residual":
        kept = residual(w, now)
        if kept.nbytes < w.nbytes:
            return kept
    return w.cpu()


def original(registry: Registry, address: str, now: Tensor) -> Tensor:
    """The base's own values of a tensor. Raises PeftliteError if a residual can't give them."""
    held = registry.originals[address]
    if not isinstance(held, Residual):
        return held.to(now.device)
    try:
        return held.restore(now)
    except ValueError as error:
        names = [name for name, merged in registry.merged.items() if address in merged.touched]
        raise PeftliteError(
            f"{address} was written to since {names[0]!r} was merged into it, and what was kept "
            "is a residual, which tells the base from the merged weights alone: put those back, or "
            "merge with backup='host' where they are to change"
        ) from error


def _moved(
    registry: Registry, tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> dict[str, Tensor | Residual]:
    """The residuals of tensors that have been written, beside what they are now."""
    return {
        address: _kept(original(registry, address, before[address]), tensor, "residual")
        for address, tensor in tensors.items()
        if isinstance(registry.originals.get(address), Residual)
    }
