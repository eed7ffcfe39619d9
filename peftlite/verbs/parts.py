"""Parts: the tensors, or parts of tensors, that several deltas change, each with their patches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from peftlite.core.assign import Placed, usable
from peftlite.core.delta import Delta, Registry
from peftlite.core.merged import original
from peftlite.core.patch import Patch
from peftlite.core.site import Site, whole_address
from peftlite.core.tensors import narrow
from peftlite.core.values import change_of
from peftlite.errors import PeftliteError
from peftlite.methods.low_rank import LowRankPatch
from peftlite.verbs.draft import Factors

Weights = Mapping[Delta, float]


@dataclass
class Part:
    """A tensor, or a part of one, with the patches of each delta that changes it."""

    site: Site
    whole: Tensor  # the tensor as it is without any delta
    patches: dict[Delta, list[Patch]]

    def change(self, delta: Delta) -> Tensor:
        """ΔW of one delta, in fp64 and the shape of the site."""
        return narrow(change_of(self.patches[delta], self.whole), self.site.index)

    def factors(self, weights: Weights) -> Factors | None:
        """A and B of Σ wᵢΔWᵢ, if all it adds up are products of low rank, of this very part."""
        left, right = [], []
        for delta, patches in self.patches.items():
            for patch in patches:
                if (
                    not isinstance(patch, LowRankPatch)
                    or type(patch).value is not LowRankPatch.value
                    or patch.index != self.site.index
                ):
                    return None
                a, b = patch.factors()
                left.append(weights[delta] * float(patch.scale) * b.double())
                right.append(a.double())
        return torch.cat(right, -2), torch.cat(left, -1)


def parts_of(registry: Registry, deltas: Sequence[Delta]) -> list[Part]:
    """What the deltas change: the parts that they name, or all of a tensor where those overlap."""
    tensors: dict[str, list[tuple[Delta, Placed]]] = {}
    for delta in deltas:
        for address, placed in delta.placed.items():
            if not placed.patch.has_value:
                raise PeftliteError(
                    f"{delta.name!r} changes calls, which no weight can hold: {address}"
                )
            placed.check()
            usable(placed.site)
            if placed.site.whole.is_meta:
                raise PeftliteError(f"{address} is on the meta device and has no values")
            # the first of its names: a file may have had another
            tensor = whole_address(placed.site.names[0])
            tensors.setdefault(tensor, []).append((delta, placed))
    return [
        part for address, pairs in tensors.items() for part in _cut_up(registry, address, pairs)
    ]


def _cut_up(
    registry: Registry, address: str, pairs: Sequence[tuple[Delta, Placed]]
) -> Iterator[Part]:
    found = {placed.site.index: placed.site for _, placed in pairs}
    if any(a.overlaps(b) for a, b in combinations(found.values(), 2)):
        site = pairs[0][1].site
        found = {None: replace(site, index=None, names=tuple(map(whole_address, site.names)))}
    for index, site in found.items():
        patches: dict[Delta, list[Patch]] = {}
        for delta, placed in pairs:
            if index is None or placed.site.index == index:
                patches.setdefault(delta, []).append(placed.patch)
        whole = site.whole
        if address in registry.originals:  # other deltas are merged into it
            whole = original(registry, address, whole)
        yield Part(replace(site, address=site.names[0]), whole, patches)
