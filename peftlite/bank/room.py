"""Room: where a bank's deltas can be, the patches that it plants there, and their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from weakref import WeakSet

import torch
from torch import Tensor, nn

from peftlite.bank.arena import Arena, Row
from peftlite.bank.entry import Entry
from peftlite.bank.families.mixed import Mixed
from peftlite.bank.families.registry import family_of
from peftlite.bank.route import Entrance, Router
from peftlite.bank.training import Leaves
from peftlite.core.assign import Placed, assign
from peftlite.core.delta import Delta
from peftlite.core.patch import Method, Patch
from peftlite.core.site import CALL, Site, locate, sites, whole_address
from peftlite.errors import PeftliteError
from peftlite.table import listed

NAME = "(bank)"
"""What the bank's patches are called in the model: no name that a user can give a delta."""

Key = tuple[str, type[Mixed]]
"""A site's address, all of a tensor, and the family that is mixed there."""


class Room:
    """A patch for every site and family that methods place, on an arena of `slots` deltas."""

    def __init__(
        self,
        model: nn.Module,
        methods: Sequence[Method],
        slots: int,
        max_rank: int,
        router: Router,
    ):
        self.model, self.methods, self.router = model, methods, router
        self._training: WeakSet[Leaves] = WeakSet()
        self._sites, self._mixed = _made_by(model, methods, max_rank)
        fields = [(self._sites[key].device, mixed.fields()) for key, mixed in self._mixed.items()]
        self.arena = Arena(fields, slots)
        self._settle()

    def patches(self) -> Delta:
        """What the bank plants."""
        # of those at one call the first is innermost, where what changes a tensor belongs
        inside = sorted(self._mixed.items(), key=lambda item: not item[1].at_call)
        placed = [(_site_of(mixed, self._sites[key]), mixed) for key, mixed in inside]
        root = next(s for s in sites(self.model) if s.is_call and s.module is self.model)
        entrance = Entrance(self.router, self.move)
        entrance.slot = CALL
        placed.append((root, entrance))  # the last at the model's call is the outermost
        for _, patch in placed:
            patch.train(self.model.training)
        return Delta(NAME, self.methods, [Placed(s, self.methods[0], p, None) for s, p in placed])

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves the memory as `model.to` moves the model. Raises PeftliteError in training."""
        if all(fn(buffer[:0]).device == buffer.device for buffer in self.arena.buffers):
            return
        if self._training:
            raise PeftliteError(
                "deltas are in training in the model's bank: bank.evict them, then move the model"
            )
        self.arena.move(fn)
        self._settle()

    def _settle(self) -> None:
        for number, mixed in enumerate(self._mixed.values()):
            mixed.settle(self.arena, self.router, number)

    def by_mixed(self, placed: Iterable[Placed]) -> list[tuple[Mixed, list[Patch]]]:
        """Patches by what mixes them; those on parts of one tensor are together.

        Raises PeftliteError if there is no room for one.
        """
        groups: dict[Key, list[Patch]] = {}
        for item in placed:
            try:
                family = family_of(item.patch, item.site)
            except PeftliteError as error:
                raise PeftliteError(f"{item.site.address}: {error}") from error
            groups.setdefault((whole_address(item.site.address), family), []).append(item.patch)
        if missing := [key[0] for key in groups if key not in self._mixed]:
            raise PeftliteError(
                f"the bank has no room for {listed(missing)}: name its method and sites in "
                "methods= when the bank is made"
            )
        return [(self._mixed[key], patches) for key, patches in groups.items()]

    @torch.no_grad()
    def encode(self, delta: Delta) -> Row:
        """A delta as a slot holds it. Raises PeftliteError if there is no room for it."""
        row = self.arena.blank()
        for mixed, patches in self.by_mixed(delta.placed.values()):
            fields = self.arena.fields(row, mixed.number)
            for name, value in mixed.encode(patches).items():
                if isinstance(value, Tensor):
                    fields[name][tuple(map(slice, value.shape))].copy_(value)
                else:
                    fields[name].fill_(value)
        return row

    @torch.no_grad()
    def decode(self, entry: Entry, row: Row) -> Delta:
        """A delta from what a slot holds of it. Raises PeftliteError if it can't be had back."""
        placed = entry.placed()
        for mixed, patches in self.by_mixed(placed):
            mixed.decode(patches, self.arena.fields(row, mixed.number))
        return Delta(entry.name, [method for method, _ in entry.built_by], placed)

    def leaves(self, entry: Entry) -> Leaves:
        """The parameters of a delta that is held in its slot. Raises PeftliteError."""
        assert entry.slot is not None
        if entry.leaves is None:
            entry.leaves = Leaves(self.by_mixed(entry.placed(on="meta")), entry.slot)
            self._training.add(entry.leaves)
        return entry.leaves


def _made_by(
    model: nn.Module, methods: Sequence[Method], max_rank: int
) -> tuple[Mapping[Key, Site], Mapping[Key, Mixed]]:
    """Where the methods' deltas can be, and what mixes them there. Raises PeftliteError."""
    found: dict[Key, Site] = {}
    mixed: dict[Key, Mixed] = {}
    for method in methods:
        for _, taken in assign(model, [method]):  # one by one: a site may have several families
            wholes, _ = locate(sites(model), {whole_address(site.address) for site in taken})
            for item in Placed.all([replace(site, on="meta") for site in taken], method):
                whole = wholes[whole_address(item.site.address)]
                key = (whole.address, family_of(item.patch, item.site))
                new = key[1](whole, item.patch, max_rank)
                if key not in mixed or new.size > mixed[key].size:
                    found[key], mixed[key] = whole, new
    return found, mixed


def _site_of(mixed: Mixed, site: Site) -> Site:
    """Where a patch is planted, by an address that nothing else has."""
    owners = tuple((module, mixed.slot) for module, _ in site.owners)
    part = f"[{site.slot} {type(mixed).__name__}]"
    return replace(site, address=site.address + part, owners=owners)
