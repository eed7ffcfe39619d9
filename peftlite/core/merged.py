"""Merged: deltas written into the base, and the base's own values, kept for the way back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from peftlite.core.delta import Delta, Merged, Registry
from peftlite.core.residual import Residual, residual
from peftlite.core.site import Site
from peftlite.core.tensors import copied, placed, write
from peftlite.core.values import applied, first_name
from peftlite.errors import PeftliteError
from peftlite.quant.packed import Packed


def base_tensor(registry: Registry, site: Site, but: Delta | None = None) -> Tensor:
    """A tensor of the base with the merged deltas in it, all or all but one."""
    address = first_name(site)
    w = original(registry, address, site.whole)
    for merged in registry.merged.values():
        if merged.delta is not but and address in merged.touched:
            w = applied(merged.touched[address][1], w)
    return w


def original(registry: Registry, address: str, now: Tensor) -> Tensor:
    """The base's own values of a tensor. Raises PeftliteError if a residual can't give them."""
    kept = registry.originals[address]
    if not isinstance(kept, Residual):
        return placed(kept, now.device)
    try:
        return kept.restore(now)
    except ValueError as error:
        names = [name for name, merged in registry.merged.items() if address in merged.touched]
        raise PeftliteError(
            f"{address} was written to since {names[0]!r} was merged into it, and what was kept "
            "is a residual, which tells the base from the merged weights alone: put those back, or "
            "merge with backup='host' where they are to change"
        ) from error


@contextlib.contextmanager
def undone(registry: Registry, record: Merged) -> Iterator[None]:
    """Writes the base as it is without one delta: from the originals, not by subtraction.

    If the body fails, the weights are as they were.
    """
    touched = record.touched.items()
    tensors = {address: site.whole for address, (site, _) in touched}
    values = {a: base_tensor(registry, site, but=record.delta) for a, (site, _) in touched}
    others = [merged for merged in registry.merged.values() if merged is not record]
    with written(tensors, values) as before:
        kept = {**registry.originals, **moved(registry, tensors, before)}
        wanted = {address for merged in others for address in merged.touched}
        registry.originals = {a: own for a, own in kept.items() if a in wanted}
        del registry.merged[record.delta.name]
        yield


@contextlib.contextmanager
def written(
    tensors: Mapping[str, Tensor], values: dict[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Gives every tensor its value, and the body what they were; takes it all back if that fails.

    The values are let go one by one, so that a tensor is there twice, not three times.
    """
    before: dict[str, Tensor] = {}
    try:
        for address, tensor in tensors.items():
            before[address] = copied(tensor)
            write(tensor, values.pop(address))
        yield dict(before)
    except BaseException:
        for address, value in before.items():
            write(tensors[address], value)
        raise


def keep(w: Tensor, now: Tensor, backup: str) -> Tensor | Residual:
    """The base's own values of a tensor, beside those it has now."""
    if backup == "device":
        return w
    if backup == "residual" and not isinstance(w, Packed):
        kept = residual(w, now)
        if kept.nbytes < w.nbytes:
            return kept
    return placed(w, "cpu")


def moved(
    registry: Registry, tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> dict[str, Tensor | Residual]:
    """The residuals of tensors that have been written, beside what they are now."""
    return {
        address: keep(original(registry, address, before[address]), tensor, "residual")
        for address, tensor in tensors.items()
        if isinstance(registry.originals.get(address), Residual)
    }
