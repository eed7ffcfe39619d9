"""Room: where a bank's deltas can be, the patches that it plants there, and their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from weakref import WeakSet

import torch
from torch import Tensor, nn

from peftlite.bank.arena import Arena, Row
from peftlite.bank.entry import Entry
from peftlite.bank.families.mixed import Mixed, put
from peftlite.bank.families.registry import family_of
from peftlite.bank.route import Entrance, Router
from peftlite.bank.split import Split, split_at
from peftlite.bank.training import Leaves
from peftlite.core.assign import Placed, assign, place
from peftlite.core.delta import Delta
from peftlite.core.patch import Method, Patch
from peftlite.core.site import CALL, Site, locate, sites, whole_address
from peftlite.errors import PeftliteError, TargetError
from peftlite.fields import as_typed
from peftlite.table import listed

NAME = "(bank)"
"""What the bank's patches are called in the model: no name that a user can give a delta."""

Key = tuple[str, type[Mixed]]
"""A site's address, all of a tensor, and the family that is mixed there."""


class Room:
    """A patch for every site and family of what is `placed`, on an arena of `slots` deltas."""

    model: nn.Module
    slots: int
    max_rank: int
    router: Router

    def __init__(
        self,
        model: nn.Module,
        placed: Sequence[Placed],
        slots: int,
        max_rank: int,
        router: Router,
    ):
        self.model, self.slots, self.max_rank, self.router = model, slots, max_rank, router
        self._placed = placed
        self._training: WeakSet[Leaves] = WeakSet()
        self._sites, self._mixed = _made_by(model, placed, max_rank)
        fields = [(self._sites[key].device, mixed.fields()) for key, mixed in self._mixed.items()]
        self.arena: Arena = Arena(fields, slots)
        self._settle()

    def grown(self, delta: Delta) -> Room:
        """Room for a delta, too: this one if it has it already. Raises PeftliteError."""
        placed = like(delta)
        _, mixed = _made_by(self.model, placed, self.max_rank)
        if all(
            key in self._mixed and new.size <= self._mixed[key].size for key, new in mixed.items()
        ):
            return self
        together = [*self._placed, *placed]
        return Room(self.model, together, self.slots, self.max_rank, self.router)

    def widened(self, row: Row, before: Room) -> Row:
        """A row of the room that there was before this one grew of it, as a row of this one."""
        wide = self.arena.blank()
        for key, mixed in before._mixed.items():
            fields = self.arena.fields(wide, self._mixed[key].number)
            for name, value in before.arena.fields(row, mixed.number).items():
                fields[name][tuple(map(slice, value.shape))].copy_(value)
        return wide

    def __str__(self) -> str:
        return f"{_described(self._placed)}, up to rank {self.max_rank}"

    def patches(self) -> Delta:
        """What the bank plants."""
        # of those at one call the first is innermost, where what changes a tensor belongs
        inside = sorted(self._mixed.items(), key=lambda item: not item[1].at_call)
        placed = [(_site_of(mixed, self._sites[key]), mixed) for key, mixed in inside]
        # the last at a call is the outermost
        calls = {site.module: site for site in sites(self.model) if site.is_call}
        split = {m for site in self._sites.values() for m in split_at(self.model, site)}
        for module in (module for module in calls if module in split):
            patch = Split(calls[module], self.router)
            placed.append((_site_of(patch, calls[module]), patch))
        entrance = Entrance(self.router, self.move)
        entrance.slot = CALL
        placed.append((calls[self.model], entrance))
        for _, patch in placed:
            patch.train(self.model.training)
        method = Method()  # any, for a delta that no file has
        return Delta(NAME, [method], [Placed(site, method, p, None) for site, p in placed])

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
        items = list(placed)
        groups: dict[Key, list[Patch]] = {}
        for item in items:
            groups.setdefault(_key(item), []).append(item.patch)
        if missing := [key[0] for key in groups if key not in self._mixed]:
            raise PeftliteError(
                f"the bank has no room for {listed(missing)}: this delta is {_described(items)}; "
                f"there is room for {self}. Give methods= what it needs when the bank is made, "
                f"such as pl.DeltaBank(model, {self.slots}, {self.max_rank}, methods=[its file]), "
                "or none, and load it before the first forward"
            )
        return [(self._mixed[key], patches) for key, patches in groups.items()]

    @torch.no_grad()
    def encode(self, delta: Delta) -> Row:
        """A delta as a slot holds it. Raises PeftliteError if there is no room for it."""
        row = self.arena.blank()
        for mixed, patches in self.by_mixed(delta.placed.values()):
            put(self.arena.fields(row, mixed.number), ..., mixed.encode(patches))
        return row

    @torch.no_grad()
    def decode(self, entry: Entry, row: Row) -> Delta:
        """A delta from what a slot holds of it. Raises PeftliteError if it can't be had back."""
        placed = entry.placed()
        for mixed, patches in self.by_mixed(placed):
            mixed.decode(patches, self.arena.fields(row, mixed.number))
        return Delta(entry.name, [method for method, _ in entry.built_by], placed)

    def leaves(self, entry: Entry, own: Iterable[Placed] = ()) -> Leaves:
        """The parameters of a delta that is held in its slot; `own` has them, if anything does.

        Raises PeftliteError.
        """
        assert entry.slot is not None
        if entry.leaves is None:
            groups = self.by_mixed(own or entry.placed(on="meta"))
            entry.leaves = Leaves(groups, entry.slot, bool(own))
            self._training.add(entry.leaves)
        return entry.leaves


def placed_by(model: nn.Module, methods: Sequence[Method]) -> list[Placed]:
    """What methods would place, without values. Raises PeftliteError."""
    return [
        item
        for method in methods  # one by one: a site may have several families
        for _, taken in assign(model, [method])
        for item in Placed.all([replace(site, on="meta") for site in taken], method)
    ]


def wherever_mixed(model: nn.Module, method: Method) -> list[Placed]:
    """What a method would place at its own targets, wherever one pass does for all rows."""
    taken = [replace(site, on="meta") for site in sites(model) if method.default(site)]
    placed = Placed.all(taken, method)
    return [item for item in placed if _is_mixed(model, item)]


def _is_mixed(model: nn.Module, item: Placed) -> bool:
    try:
        found, _ = _made_by(model, [item], 1)
        return not any(split_at(model, site) for site in found.values())
    except TargetError:
        return False


def like(delta: Delta) -> list[Placed]:
    """What a delta has placed, without values; in its own dtype if it is trainable."""
    by_method = [
        (_trained(how, placed), [item.site.address for item in placed])
        for how, placed in delta.by_method()
    ]
    shapes = {
        address: {name: tensor.shape for name, tensor in item.patch.saved().items()}
        for address, item in delta.placed.items()
    }
    there = {address: item.site for address, item in delta.placed.items()}
    return place(there, by_method, shapes, on="meta")


def _trained(method: Method, placed: Sequence[Placed]) -> Method:
    """A method whose slots are of the dtype in which it is trained, where that isn't the base's."""
    learned = {p.dtype for item in placed for p in item.patch.parameters() if p.requires_grad}
    base = {item.site.tensor.dtype for item in placed if not item.site.is_call}
    if len(learned) != 1 or learned <= base or getattr(method, "dtype", learned) is not None:
        return method
    return replace(method, dtype=learned.pop())


def _made_by(
    model: nn.Module, placed: Sequence[Placed], max_rank: int
) -> tuple[Mapping[Key, Site], Mapping[Key, Mixed]]:
    """Where the deltas can be, and what mixes them there. Raises PeftliteError."""
    found: dict[Key, Site] = {}
    mixed: dict[Key, Mixed] = {}
    wholes, _ = locate(sites(model), {whole_address(item.site.address) for item in placed})
    for item in placed:
        address, family = _key(item)
        whole = wholes[address]
        key, new = (whole.address, family), family(whole, item.patch, max_rank)
        if key not in mixed:
            split_at(model, whole)  # or it's refused
        if key not in mixed or new.size > mixed[key].size:
            found[key], mixed[key] = whole, new
    return found, mixed


def _key(item: Placed) -> Key:
    try:
        return whole_address(item.site.address), family_of(item.patch, item.site)
    except PeftliteError as error:
        raise PeftliteError(f"{item.site.address}: {error}") from error


def _described(placed: Iterable[Placed]) -> str:
    """Methods and how many sites each has, and the first of them."""
    by_method: dict[str, list[str]] = {}
    for item in placed:
        by_method.setdefault(as_typed(item.method), []).append(item.site.address)
    return listed(
        f"{method} at {taken[0]}" + (f" and {len(taken) - 1} more" if taken[1:] else "")
        for method, taken in by_method.items()
    )


def _site_of(patch: Patch, site: Site) -> Site:
    """Where a patch is planted, by an address that nothing else has."""
    owners = tuple((module, patch.slot) for module, _ in site.owners)
    part = f"[{site.slot} {type(patch).__name__}]"
    return replace(site, address=site.address + part, owners=owners)
