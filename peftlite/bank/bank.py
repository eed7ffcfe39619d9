"""DeltaBank: many deltas on one model, mixed row by row, and swapped without a pause."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

from torch import nn

from peftlite.bank.arena import Row
from peftlite.bank.batches import Batches, FixedRows
from peftlite.bank.counts import Counts
from peftlite.bank.entry import Entry
from peftlite.bank.room import NAME, Room, like, placed_by, wherever_mixed
from peftlite.bank.route import Router
from peftlite.bank.slots import Slots, state
from peftlite.bank.source import delta_of, reread
from peftlite.bank.store import HostStore
from peftlite.bank.training import training_rows
from peftlite.core.assign import Placed, methods_in
from peftlite.core.attach import check_model, check_name, commit, detach
from peftlite.core.delta import Delta
from peftlite.core.find import require
from peftlite.core.patch import Method
from peftlite.errors import PeftliteError
from peftlite.io.fitting import CheckBase
from peftlite.io.native import save
from peftlite.methods.lora import LoRA
from peftlite.table import Shown, format_cell, short, size, table

Source: TypeAlias = str | os.PathLike[str] | Delta | Method
"""What a delta comes of: a file, a delta of this model or a copy of it, or a method."""


class DeltaBank(Shown):
    """y_j = what the model with delta k_j gives for row j, in one batch, k_j a different one each.

    The bank's memory is `slots` deltas on the model's device, each with room for what `methods`
    place, up to `max_rank`; without `methods`, also for whatever is loaded before the first
    forward, from which on it is fixed. More deltas than slots wait on the host, or behind
    `memory_budget` on disk, and come in when they are named; the least recently used goes.

    The bank freezes the base and is the model's standing choice until `close` takes it off.

    Args:
        model: any module whose inputs have the batch as their first dimension.
        slots: how many deltas are on the device at once, and so how many one batch can mix.
        max_rank: the largest rank that fits.
        methods: what to make room for, and where: methods, files and deltas that need it. If None,
            `LoRA(rank=max_rank)` wherever its rows can be told apart, and what is loaded before
            the first forward.
            A method's `dtype` is the slots'; by default that of the weight beside it, or that of a
            trainable delta.
        memory_budget: bytes of the host's memory for deltas; all they need if None.

    Raises:
        PeftliteError: a number isn't positive, a method can't be mixed, or the model has a bank.
        TargetError: a target names nothing, or a site where rows can't be told apart.
        FileError: a file that should have room can't be read, or doesn't fit the model.

    Example:
        model = nn.Linear(8, 4)
        with pl.DeltaBank(model, slots=2, max_rank=4) as bank:
            bank.load("sql", pl.LoRA(rank=4))
            bank.load("chat", pl.LoRA(rank=2))
            with bank.rows(["sql", None, "chat"]):
                y = model(torch.randn(3, 8))
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        slots: int,
        max_rank: int,
        methods: Source | Sequence[Source] | None = None,
        memory_budget: int | None = None,
    ):
        _positive("slots", slots)
        _positive("max_rank", max_rank)
        if memory_budget is not None:
            _positive("memory_budget", memory_budget)
        if NAME in check_model(model).deltas:
            raise PeftliteError("this model has a bank already: close it first, or use it")
        self.model, self._router = model, Router()
        self._grows, self._loading, self._budget = methods is None, threading.RLock(), memory_budget
        default = LoRA(rank=max_rank)
        placed = wherever_mixed(model, default) if methods is None else _needs(model, methods)
        self._move_into(Room(model, placed, slots, max_rank, self._router))

    def _move_into(self, room: Room) -> None:
        self._room, self._arena = room, room.arena
        self._store = HostStore(
            room.arena,
            self._budget,
            lambda entry: room.encode(reread(self.model, entry.name, entry.origin)),
        )
        self._slots = Slots(room.arena, room.slots, self._store.fetch)
        commit(self.model, room.patches())
        self._batches = Batches(self._slots, room.arena, require(self.model)[1].choice)

    def _make_room(self, delta: Delta) -> None:
        """Makes room for a delta, if nothing has run yet and the room isn't a given one."""
        before, store, slots = self._room, self._store, self._slots
        room = before if self._fixed else before.grown(delta)
        if room is before:
            return
        rows = {entry: room.widened(store.fetch(entry), before) for entry in slots.known.values()}
        detach(self.model, NAME)
        self._move_into(room)
        for entry, row in rows.items():
            entry.slot, entry.spilled = None, None
            self._keep(entry, row)
        store.close()

    @property
    def _fixed(self) -> bool:
        return not self._grows or self._router.ran

    def _keep(self, entry: Entry, row: Row) -> None:
        self._store.put(entry, row)
        try:
            self._slots.seat(entry, needed=entry.pinned)
        except BaseException:
            self._store.drop(entry)
            raise
        if (old := self._slots.put(entry)) is not None:
            self._store.drop(old)

    @property
    def closed(self) -> bool:
        """Whether it has left its model."""
        return self._batches.closed

    # -- what is in it

    def load(
        self,
        name: str,
        source: Source | Sequence[Method],
        *,
        pin: bool = False,
        check_base: CheckBase = "error",
    ) -> None:
        """Takes in a delta: of a file, of this model or a copy of it, or new, from its methods.

        It is checked as `pl.load` checks it, and against the room that there is. It goes into a
        slot if one can be had now, and otherwise when it is named. A delta of the same name is
        replaced for what begins from now on; what runs keeps the old one to its end.

        Args:
            pin: whether it stays in its slot when others come.
            check_base: as in `pl.load`.

        Raises:
            PeftliteError, FileError, BaseMismatchError: the bank is as it was.

        Example:
            bank = pl.DeltaBank(nn.Linear(8, 4), slots=2, max_rank=4)
            bank.load("new", pl.LoRA(rank=4), pin=True)
            bank.save("new", "new.safetensors")
            bank.load("again", "new.safetensors")
        """
        check_name(name)
        delta, origin = delta_of(self.model, name, source, check_base)
        entry = Entry.of(name, delta, origin, pin)
        with self._loading if not self._fixed else nullcontext():
            self._make_room(delta)
            self._keep(entry, self._room.encode(delta))

    @property
    def names(self) -> list[str]:
        """The deltas that it has, wherever they are."""
        return list(self._slots.known)

    @property
    def counts(self) -> Counts:
        """How often each delta was in a slot when a batch named it, came in, and left.

        A `prefetch` or `pin` that brings one in counts nothing: no batch waits for it.
        """
        with self._slots.lock:
            return Counts.of(self._slots.known.values())

    def _summary(self) -> str:
        slots, a_slot = self._slots, size(self._arena.row_bytes)
        return (
            f"{len(slots.known)} deltas, {len(slots.resident)} in {slots.count} slots of "
            f"{a_slot}, {size(self._store.num_bytes)} on the host; room for {self._room}"
        )

    def _lines(self) -> Iterator[str]:
        with self._slots.lock:
            entries = [*self._slots.known.values()]
            rows = [
                [e.name, format_cell(e.slot), state(e), *map(str, (e.hits, e.misses, e.evictions))]
                for e in entries
            ]
        yield table(["delta", "slot", "state", "hits", "misses", "evictions"], rows)
        yield self._summary()

    # -- who uses it

    @contextmanager
    def rows(self, names: Sequence[str | None], repeat: int = 1) -> Iterator[None]:
        """A `with` in which row j of a batch has the delta `names[j]`; None is the base.

        It holds for this thread or async task, and its deltas stay in their slots. A single name is
        every row's. The rows that transformers' `generate` makes of one, for its beams, have the
        delta of that one.

        Args:
            repeat: how many rows in turn share each name, where a batch has so many times more.

        Raises:
            PeftliteError: a delta isn't the bank's, can't be brought in, or they outnumber the
                slots; the model runs another choice; in a forward: the batch has other rows.
            FileError: the file that it is to come from has changed or gone.

        Example:
            bank = pl.DeltaBank(nn.Linear(8, 4), slots=2, max_rank=4)
            bank.load("sql", pl.LoRA(rank=4))
            with bank.rows(["sql", None]):
                y = bank.model(torch.randn(2, 8))
        """
        _positive("repeat", repeat)
        batches = self._settled()
        entries, numbers = batches.hold(names)
        try:
            leaves = {e.slot or 0: e.leaves for e in entries if e.leaves is not None}
            if any(own.is_made for own in leaves.values()):
                self._router.leaves.update(leaves)
                rows = training_rows(numbers, leaves, repeat)
            else:
                rows = batches.rows(numbers, repeat)
            with self._router.scope(rows):
                yield
        finally:
            batches.release(entries)

    def use(self, name: str | None) -> AbstractContextManager[None]:
        """A `with` in which every row has the delta `name`, as `rows` has it. Raises as it does."""
        return self.rows((name,))

    def _settled(self) -> Batches:
        """The batches of the room that is fixed from now on."""
        if not self._fixed:
            with self._loading:  # what is being loaded may make room yet
                self._router.ran = True
        return self._batches

    def static(self, b: int) -> FixedRows:
        """`b` rows that change in place, at one address, so that one CUDA graph serves every mix.

        Capture the graph inside the `with`; then `set` the names before each replay.

        Raises:
            PeftliteError: `b` is no positive whole number.

        Example:
            bank = pl.DeltaBank(nn.Linear(8, 4), slots=2, max_rank=4)
            bank.load("sql", pl.LoRA(rank=4))
            rows = bank.static(2)
            rows.set(["sql", None])
            with rows:
                y = bank.model(torch.randn(2, 8))
        """
        _positive("b", b)
        return FixedRows(b, self._settled(), self._router)

    # -- training

    @contextmanager
    def train(self, names: Sequence[str | None]) -> Iterator[None]:
        """A `with` like `rows`, in which row j's loss has gradients for the delta `names[j]` alone.

        Sum the rows' losses: each delta learns as it would alone. Put the backward pass inside.
        Compiled code adds gradients to `.grad` alone: `torch.autograd.grad` finds none there.

        Raises:
            PeftliteError: as `rows`; or a delta isn't all in the tables, as a DoRA's isn't, and
                wasn't adopted; or its slots are in half precision.
            FileError: as `rows`.

        Example:
            bank = pl.DeltaBank(nn.Linear(8, 4), slots=2, max_rank=4)
            bank.load("sql", pl.LoRA(rank=4))
            optimizer = torch.optim.SGD(bank.parameters("sql"), lr=0.1)
            with bank.train(["sql", None]):
                bank.model(torch.randn(2, 8)).square().sum().backward()
            optimizer.step()
        """
        batches = self._settled()
        entries, numbers = batches.hold(names)
        try:
            leaves = {entry.slot or 0: self._room.leaves(entry) for entry in entries}
            with self._router.training(training_rows(numbers, leaves), leaves):
                yield
        finally:
            batches.release(entries)

    def adopt(self, name: str, delta: Delta) -> None:
        """Has a delta of this model, attached or not, learn by `train`, on its own parameters.

        They live in a slot until `evict`, with their last values from then on; what a slot holds
        that is made of them, as of a DoRA's, is made anew for each batch.

        Raises PeftliteError: as `load` and `train`, or its parameters aren't what a slot holds.

        Example:
            model = nn.Linear(8, 4)
            delta = pl.attach(model, pl.LoRA(rank=4), name="sql")
            bank = pl.DeltaBank(model, slots=2, max_rank=4, methods=delta)
            bank.adopt("sql", delta)
            with bank.train(["sql", None]):
                model(torch.randn(2, 8)).square().sum().backward()
            bank.evict("sql")
        """
        self.load(name, delta, check_base="off")
        self._settled()
        entry = self._slots.bring(name)
        try:
            self._room.leaves(entry, list(delta.placed.values()))
        except BaseException:
            self.drop(name)
            raise
        finally:
            self._slots.release([entry])

    def named_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of a delta as `address:name`, on its slot's memory, in the slots' dtype.

        While it trains it keeps its slot; `evict` ends that. Raises as `train`.
        """
        self._settled()
        entry = self._slots.bring(name)
        try:
            return iter(self._room.leaves(entry).named.items())
        finally:
            self._slots.release([entry])

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of a delta, for an optimizer, as `named_parameters`. Raises as `train`."""
        return (parameter for _, parameter in self.named_parameters(name))

    def delta(self, name: str) -> Delta:
        """A delta as it is now, attached to nothing.

        What isn't its tensors in a slot (a VeRA's, for one) can't be had back: keep its file.

        Raises:
            PeftliteError: there is none of that name, or it can't be had back.
            FileError: the file that it is to come from has changed or gone.
        """
        with self._slots.lock:
            entry = self._slots.entry(name)
            # in training it keeps its slot, and there alone is what it has learned
            row = self._arena.read(entry.slot or 0) if entry.leaves else None
        return self._room.decode(entry, self._store.fetch(entry) if row is None else row)

    def save(self, name: str, path: str | os.PathLike[str], **options: Any) -> None:
        """Writes a delta as it is now, as `pl.save` with its options. Raises as `delta`."""
        save(self.delta(name), path, **options)

    # -- where it is

    def prefetch(self, name: str) -> None:
        """Brings a delta into a slot, on CUDA while other work goes on. Raises PeftliteError."""
        self._slots.release([self._slots.bring(name)])

    def evict(self, name: str) -> None:
        """Frees the slot of a delta, which stays in the bank. Raises PeftliteError if it's in use.

        What was trained goes to the host; parameters that were given out are the delta's no more.
        """
        self._slots.evict(name, self._store.keep)

    def pin(self, name: str) -> None:
        """Brings a delta into a slot, where it stays until `unpin`. Raises PeftliteError."""
        entry = self._slots.bring(name)
        entry.pinned = True
        self._slots.release([entry])

    def unpin(self, name: str) -> None:
        """Lets a delta go from its slot when others need one. Raises PeftliteError."""
        with self._slots.lock:
            self._slots.entry(name).pinned = False

    def drop(self, name: str) -> None:
        """Forgets a delta; what uses it keeps it to its end. Raises PeftliteError."""
        self._store.drop(self._slots.drop(name))

    def close(self) -> None:
        """Takes the bank off the model, which is as it was. Raises PeftliteError if it's in use."""
        if self.closed:
            return
        self._slots.close()
        detach(self.model, NAME)
        self._store.close()
        self._batches.closed = True

    def __enter__(self) -> DeltaBank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _needs(model: nn.Module, given: Any) -> list[Placed]:
    """What methods, files and deltas need, without values."""
    placed: list[Placed] = []
    for source in given if isinstance(given, list | tuple) and given else [given]:
        if isinstance(source, str | os.PathLike | Delta):
            placed += like(delta_of(model, NAME, source, "error")[0])
        else:
            placed += placed_by(model, methods_in(source))
    return placed


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PeftliteError(f"{name} is a positive whole number, not {short(value)}")
