"""Stock: the patches that a bank plants, and deltas as their slots hold them, there and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from weakref import WeakSet

import torch
from torch import Tensor, nn

from peftlite.bank.arena import Arena, Row
from peftlite.bank.entry import Entry
from peftlite.bank.families.mixed import Mixed
from peftlite.bank.families.registry import family_of
from peftlite.bank.route import Entrance, Router
from peftlite.bank.source import reread
from peftlite.bank.store import Shelf
from peftlite.bank.training import Leaves
from peftlite.core.assign import Placed, assign
from peftlite.core.delta import Delta
from peftlite.core.patch import Method, Patch
from peftlite.core.site import CALL, Site, locate, sites, whole_address
from peftlite.errors import PeftliteError
from peftlite.table import listed

Key = tuple[str, type[Mixed]]
"""A site's address, all of a tensor, and the family that is mixed there."""


class Stock:
    """What a bank has room for: a patch per site and family, their memory, and rows for it."""

    def __init__(
        self,
        model: nn.Module,
        methods: Sequence[Method],
        slots: int,
        max_rank: int,
        budget: int | None,
        router: Router,
    ):
        self.model, self.methods, self.router = model, methods, router
        self._training: WeakSet[Leaves] = WeakSet()
        self._sites, self._mixed = _room(model, methods, max_rank)
        self.arena = Arena([(self._sites[k].device, m.fields()) for k, m in self.items()], slots)
        self.shelf = Shelf(self.arena, budget)
        self._settle()

    def items(self) -> Iterable[tuple[Key, Mixed]]:
        return self._mixed.items()

    def patches(self, name: str) -> Delta:
        """What the bank plants, under a name that no user's delta has."""
        # of those at one call the first is innermost, where what changes a tensor belongs
        inside = sorted(self.items(), key=lambda item: not item[1].at_call)
        placed = [(_planted(self._sites[key], mixed), mixed) for key, mixed in inside]
        root = next(s for s in sites(self.model) if s.is_call and s.module is self.model)
        entrance = Entrance(self.router, self.move)
        entrance.slot = CALL
        placed.append((root, entrance))  # the last at the model's call is the outermost
        for _, patch in placed:
            patch.train(self.model.training)
        return Delta(name, self.methods, [Placed(s, self.methods[0], p, None) for s, p in placed])

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
        for number, (_, mixed) in enumerate(self.items()):
            mixed.settle(self.arena, self.router, number)

    @torch.no_grad()
    def row(self, delta: Delta) -> Row:
        """A delta as a slot holds it. Raises PeftliteError if there is no room for it."""
        row = self.arena.blank()
        for mixed, patches in self._at(delta.placed.values()):
            held = self.arena.of_row(row, mixed.number)
            for name, value in mixed.read(patches).items():
                if isinstance(value, Tensor):
                    held[name][tuple(map(slice, value.shape))].copy_(value)
                else:
                    held[name].fill_(value)
        return row

    @torch.no_grad()
    def delta(self, entry: Entry, row: Row) -> Delta:
        """A delta from what a slot holds of it. Raises PeftliteError if it can't be had back."""
        placed = list(_placed(entry))
        for mixed, patches in self._at(placed):
            mixed.restore(patches, self.arena.of_row(row, mixed.number))
        return Delta(entry.name, [method for method, _ in entry.made], placed)

    def leaves(self, entry: Entry) -> Leaves:
        """The parameters of a delta that is held in its slot. Raises PeftliteError."""
        assert entry.slot is not None
        if entry.leaves is None:
            entry.leaves = Leaves(self._at(_placed(entry, on="meta")), entry.slot)
            self._training.add(entry.leaves)
        return entry.leaves

    def fetch(self, entry: Entry) -> Row:
        """A delta's row, from the host's memory or from disk. Raises FileError."""
        row = self.shelf.get(entry)
        if row is None:
            row = self.shelf.read(entry) if entry.spilled else self._reread(entry)
            self.shelf.put(entry, row)
        return row

    def _reread(self, entry: Entry) -> Row:
        return self.row(reread(self.model, entry.name, entry.source))

    def keep(self, entry: Entry) -> None:
        """Takes what was trained of a delta to the host, where it is what the delta is."""
        assert entry.slot is not None
        self.shelf.drop(entry)
        entry.source = None
        self.shelf.put(entry, self.arena.read(entry.slot))

    def _at(self, placed: Iterable[Placed]) -> list[tuple[Mixed, list[Patch]]]:
        """Patches by what mixes them; those on parts of one tensor are together."""
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


def made(delta: Delta) -> list[tuple[Method, list[Site]]]:
    """What a delta was built by."""
    placed = delta.placed.values()
    return [(m, [item.site for item in placed if item.method is m]) for m in delta.methods]


def _placed(entry: Entry, on: str | None = None) -> Iterator[Placed]:
    """Patches such as a delta was made of, without values."""
    for method, where in entry.made:
        yield from Placed.all([replace(site, on=on) for site in where], method)


def _room(
    model: nn.Module, methods: Sequence[Method], max_rank: int
) -> tuple[Mapping[Key, Site], Mapping[Key, Mixed]]:
    """Where the methods' deltas can be, and what mixes them there. Raises PeftliteError."""
    where: dict[Key, Site] = {}
    mixed: dict[Key, Mixed] = {}
    for method in methods:
        for how, taken in assign(model, [method]):  # one by one: a site may have several families
            wholes, _ = locate(model, {whole_address(site.address) for site in taken})
            for item in Placed.all([replace(site, on="meta") for site in taken], how):
                whole = wholes[whole_address(item.site.address)]
                key = (whole.address, family_of(item.patch, item.site))
                new = key[1](whole, item.patch, max_rank)
                if key not in mixed or new.size > mixed[key].size:
                    where[key], mixed[key] = whole, new
    return where, mixed


def _planted(where: Site, mixed: Mixed) -> Site:
    """Where a patch sits, by an address that nothing else has."""
    owners = tuple((module, mixed.slot) for module, _ in where.owners)
    part = f"[{where.slot} {type(mixed).__name__}]"
    return replace(where, address=where.address + part, owners=owners)
