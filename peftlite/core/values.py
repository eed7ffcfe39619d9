"""Values: the tensors of a delta's base as its patches make them, by tensor and at inference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peftlite.core.delta import Delta
from peftlite.core.patch import Patch, apply
from peftlite.core.site import Site, whole_address
from peftlite.core.tensors import (
    as_stored,
    distance,
    is_opaque,
    is_sharded,
    shard_like,
    unshard,
)
from peftlite.errors import PeftliteError


def by_tensor(delta: Delta) -> dict[str, tuple[Site, list[Patch]]]:
    """The patches of a delta by whole tensor, the parts of one together."""
    found: dict[str, tuple[Site, list[Patch]]] = {}
    for placed in delta.placed.values():
        found.setdefault(first_name(placed.site), (placed.site, []))[1].append(placed.patch)
    return found


def first_name(site: Site) -> str:
    """What the whole tensor at a site goes by, whichever of its names a file had."""
    return whole_address(site.names[0])


def refuse_calls(delta: Delta) -> None:
    """Raises PeftliteError if a delta changes more than tensors."""
    if calls := [a for a, placed in delta.placed.items() if not placed.patch.has_value]:
        raise PeftliteError(
            f"{delta.name!r} changes calls, which no weight can hold: {calls[0]} ({len(calls)} "
            "sites); keep it attached"
        )


@torch.no_grad()
def applied(patches: Sequence[Patch], w: Tensor) -> Tensor:
    """W', in the shape of W, with patches as they are at inference: no dropout, no autocast.

    Raises PeftliteError if W is quantised.
    """
    _refuse_codes(w)
    training = [patch.training for patch in patches]
    try:
        for patch in patches:
            patch.eval()
        with torch.autocast(w.device.type, enabled=False):
            parameters = (p for patch in patches for p in patch.parameters())
            if not is_sharded(w) or any(map(is_sharded, parameters)):
                return apply(patches, w)
            return shard_like(apply(patches, unshard(w)), w)
    finally:
        for patch, mode in zip(patches, training, strict=True):
            patch.train(mode)


def change_of(patches: Sequence[Patch], w: Tensor) -> Tensor:
    """ΔW = W' − W in fp64 and the shape of W, as at inference. Raises as `applied`."""
    _refuse_codes(w)
    w = w.detach().double()
    return applied(patches, w) - w


def _refuse_codes(w: Tensor) -> None:
    if is_opaque(w):
        raise PeftliteError(
            f"{type(w).__name__} holds codes for numbers: what a delta makes of it fits none of "
            "them. Keep it attached, or go back to the base before it was quantised"
        )


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
    return as_stored(value, w), change
