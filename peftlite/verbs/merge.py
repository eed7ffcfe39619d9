"""merge and unmerge: a delta written into the base, with the way back exact to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from peftlite.core.attach import check_in_place, quiet, remove, restoring, warn_of_buffers
from peftlite.core.delta import Delta, Merged, Registry
from peftlite.core.find import require_delta
from peftlite.core.merged import keep, moved, undone, written
from peftlite.core.patch import Patch
from peftlite.core.residual import Residual
from peftlite.core.site import Site
from peftlite.core.tensors import bytes_in, distance
from peftlite.core.turns import in_turn
from peftlite.core.values import applied, by_tensor, checked, refuse_calls
from peftlite.errors import PeftliteError
from peftlite.fields import check_given
from peftlite.quant.packed import Packed
from peftlite.table import Shown, listed, size, table

Backup = Literal["device", "host", "residual", "none"]


@dataclass(frozen=True, repr=False)
class Receipt(Shown):
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

    def _summary(self) -> str:
        kept = f"keeping {size(sum(self.bytes_kept.values()))} for the way back"
        return f"merged {self.name!r}, {kept if self.bytes_kept else 'for good'}"

    def _lines(self) -> Iterator[str]:
        columns = {
            "tensor": list(self.max_change),
            "max |change|": [f"{change:.3g}" for change in self.max_change.values()],
            "rounding": [f"{loss:.3g}" for loss in self.rounding.values()],
            "kept": [size(count) for count in self.bytes_kept.values()],
        }
        shown = {what: cells for what, cells in columns.items() if cells}
        yield self._summary()
        yield table([*shown], [*zip(*shown.values(), strict=True)])


@in_turn
def merge(
    model: nn.Module, delta: Delta | str, *, backup: Backup = "device", requantize: bool = True
) -> Receipt:
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
            were written to since, which a copy overrules. Of packed weights codes are kept.
        requantize: whether packed weights may be packed again with the delta in them, whose error
            the receipt has as rounding.

    Raises:
        PeftliteError: the delta changes calls, a weight would not be finite, the model is on the
            meta device, or packed and not to be packed again. The model is as it was.

    Example:
        model = nn.Linear(4, 2)
        pl.attach(model, pl.LoRA(rank=2), name="sql")
        print(pl.merge(model, "sql", backup="host"))
    """
    root, registry, delta = require_delta(model, delta)
    name = delta.name
    warn_of_buffers(registry, stacklevel=4)
    touched = _mergeable(root, registry, delta, backup, requantize)
    tensors = {address: site.whole for address, (site, _) in touched.items()}
    values, change, rounding = {}, {}, {}
    for address, (_, patches) in touched.items():
        w = tensors[address]
        values[address], change[address] = checked(name, address, patches, w)
        rounding[address] = distance(values[address], applied(patches, w.double()))
    kept: dict[str, Tensor | Residual] = {}
    with (
        quiet(root, registry),
        restoring(root, registry),
        written(tensors, values) as before,
    ):
        residuals = moved(registry, tensors, before)
        if backup == "none":
            remove(root, registry, name)
        else:
            for address in tensors.keys() - registry.originals.keys():
                kept[address] = keep(before.pop(address), tensors[address], backup)
            registry.originals |= {**residuals, **kept}
            registry.merged[name] = Merged(delta, touched, registry.choice.standing)
            registry.choice.publish(tuple(n for n in registry.choice.standing if n != name))
        bytes_kept = {a: _bytes_of(kept.get(a)) for a in tensors if backup != "none"}
        return Receipt(name, change, rounding, bytes_kept)


@in_turn
def unmerge(model: nn.Module, delta: Delta | str) -> None:
    """Takes a merged delta out of the base again, exact to the bit, whatever was merged since.

    The delta is chosen again if it was when it was merged. Raises PeftliteError; the model is then
    as it was.

    Example:
        model = nn.Linear(4, 2)
        pl.merge(model, pl.attach(model, pl.LoRA(rank=2), name="sql"))
        pl.unmerge(model, "sql")
    """
    root, registry, delta = require_delta(model, delta)
    name = delta.name
    if name not in registry.merged:
        there = listed(registry.merged) or "none"
        raise PeftliteError(f"{name!r} is not merged; merged are: {there}")
    record = registry.merged[name]
    with quiet(root, registry), restoring(root, registry), undone(registry, record):
        if name in record.standing:
            now = registry.choice.standing
            before = [n for n in record.standing if n == name or n in now]
            registry.choice.publish((*before, *(n for n in now if n not in before)))


def _mergeable(
    root: nn.Module, registry: Registry, delta: Delta, backup: str, requantize: bool
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
    check_in_place(root, delta)
    touched = by_tensor(delta)
    for address, (site, _) in touched.items():
        if site.whole.is_meta:
            raise PeftliteError(f"{address} is on the meta device and has no values to merge into")
        if isinstance(site.whole, Packed) and not requantize:
            raise PeftliteError(
                f"{address} is packed, and merging packs it again: requantize=True allows that, or "
                "keep the delta attached"
            )
        if not site.is_stored and not isinstance(site.whole, Packed):
            raise PeftliteError(
                f"{address} is computed by a parametrization, not stored: remove it first with "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
        if backup == "none" and address in registry.originals:
            raise PeftliteError(f"{address} holds another merged delta: unmerge that first")
    return touched


def _bytes_of(kept: Tensor | Residual | None) -> int:
    if kept is None:
        return 0
    return kept.nbytes if isinstance(kept, Residual) else bytes_in(kept)
