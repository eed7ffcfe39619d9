"""DeltaBank: many deltas on one model, mixed row by row, and swapped without a pause."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from peftlite.bank.batches import Batches, FixedRows
from peftlite.bank.entry import Entry
from peftlite.bank.room import NAME, Room
from peftlite.bank.route import Router
from peftlite.bank.slots import Slots
from peftlite.bank.source import delta_of, reread
from peftlite.bank.store import HostStore
from peftlite.bank.training import training_rows
from peftlite.core.assign import methods_in
from peftlite.core.attach import check_model, check_name, commit, detach
from peftlite.core.delta import Delta
from peftlite.core.find import require
from peftlite.core.patch import Method
from peftlite.errors import PeftliteError
from peftlite.io.fitting import CheckBase
from peftlite.io.native import save
from peftlite.methods.lora import LoRA
from peftlite.table import short, size


class DeltaBank:
    """y_j = what the model with delta k_j gives for row j, in one batch, k_j a different one each.

    The bank's memory is fixed when it is made: `slots` deltas on the model's device, each with
    room for what `methods` place, up to `max_rank`. More deltas than slots wait on the host, or
    behind `memory_budget` on disk, and come in when they are named; the least recently used goes.

    The bank freezes the base and is the model's standing choice until `close` takes it off.

    Args:
        model: any module whose inputs have the batch as their first dimension.
        slots: how many deltas are on the device at once, and so how many one batch can mix.
        max_rank: the largest rank that fits.
        methods: what to make room for, and where; `LoRA(rank=max_rank)` at its own targets if None.
            A method's `dtype` is the slots'; by default that of the weight beside it.
        memory_budget: bytes of the host's memory for deltas; all they need if None.

    Raises:
        PeftliteError: a number isn't positive, a method can't be mixed, or the model has a bank.
        TargetError: a target names nothing, or a site where rows can't be told apart.

    Example:
        model = nn.Linear(8, 4)
        with pl.DeltaBank(model, slots=2, max_rank=4) as bank:
            bank.load("sql", pl.LoRA(rank=4))
            bank.load("chat", pl.LoRA(rank=2))
            with bank.rows(["sql", None, "chat"]):
                y = model(torch.randn(3, 8))
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int,
        max_rank: int,
        methods: Method | Sequence[Method] | None = None,
        memory_budget: int | None = None,
    ):
        _positive("slots", slots)
        _positive("max_rank", max_rank)
        if memory_budget is not None:
            _positive("memory_budget", memory_budget)
        if NAME in check_model(model).deltas:
            raise PeftliteError("this model has a bank already: close it first, or use it")
        made_for = [LoRA(rank=max_rank)] if methods is None else methods_in(methods)
        self.model, self._router = model, Router()
        self._room = room = Room(model, made_for, slots, max_rank, self._router)
        self._arena = room.arena
        self._store = HostStore(
            room.arena,
            memory_budget,
            lambda entry: room.encode(reread(model, entry.name, entry.origin)),
        )
        self._slots = Slots(room.arena, slots, self._store.fetch)
        commit(model, room.patches())
        self._batches = Batches(self._slots, room.arena, require(model)[1].choice)

    @property
    def closed(self) -> bool:
        """Whether it has left its model."""
        return self._batches.closed

    # -- what is in it

    def load(
        self,
        name: str,
        source: str | os.PathLike[str] | Delta | Method | Sequence[Method],
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
        self._store.put(entry, self._room.encode(delta))
        try:
            self._slots.seat(entry, needed=pin)
        except BaseException:
            self._store.drop(entry)
            raise
        if (old := self._slots.put(entry)) is not None:
            self._store.drop(old)

    @property
    def names(self) -> list[str]:
        """The deltas that it has, wherever they are."""
        return list(self._slots.known)

    def __repr__(self) -> str:
        slots, a_slot = self._slots, size(self._arena.row_bytes)
        return (
            f"DeltaBank({len(slots.known)} deltas, {len(slots.resident)} in {slots.count} slots of "
            f"{a_slot}, {size(self._store.num_bytes)} on the host)"
        )

    # -- who uses it

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """A `with` in which row j of a batch has the delta `names[j]`; None is the base.

        It holds for this thread or async task, and its deltas stay in their slots. A batch of
        k·len(names) rows has k of them for each name, as a beam search makes them.

        Raises:
            PeftliteError: a delta isn't the bank's, can't be brought in, or they outnumber the
                slots; the model runs another choice.
            FileError: the file that it is to come from has changed or gone.

        Example:
            bank = pl.DeltaBank(nn.Linear(8, 4), slots=2, max_rank=4)
            bank.load("sql", pl.LoRA(rank=4))
            with bank.rows(["sql", None]):
                y = bank.model(torch.randn(2, 8))
        """
        entries, numbers = self._batches.hold(names)
        try:
            with self._router.scope(self._batches.rows(numbers)):
                yield
        finally:
            self._batches.release(entries)

    def use(self, name: str | None) -> AbstractContextManager[None]:
        """A `with` in which every row has the delta `name`, as `rows` has it. Raises as it does."""
        return self.rows((name,))

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
        return FixedRows(b, self._batches, self._router)

    # -- training

    @contextmanager
    def train(self, names: Sequence[str | None]) -> Iterator[None]:
        """A `with` like `rows`, in which row j's loss has gradients for the delta `names[j]` alone.

        Sum the rows' losses: each delta learns as it would alone. Put the backward pass inside.

        Raises:
            PeftliteError: as `rows`; or a delta isn't all in the tables, as a DoRA's isn't, or its
                slots are in half precision.
            FileError: as `rows`.

        Example:
            bank = pl.DeltaBank(nn.Linear(8, 4), slots=2, max_rank=4)
            bank.load("sql", pl.LoRA(rank=4))
            optimizer = torch.optim.SGD(bank.parameters("sql"), lr=0.1)
            with bank.train(["sql", None]):
                bank.model(torch.randn(2, 8)).square().sum().backward()
            optimizer.step()
        """
        entries, numbers = self._batches.hold(names)
        try:
            leaves = {entry.slot or 0: self._room.leaves(entry) for entry in entries}
            with self._router.scope(training_rows(numbers, leaves)):
                yield
        finally:
            self._batches.release(entries)

    def named_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of a delta as `address:name`, on its slot's memory, in the slots' dtype.

        While it trains it keeps its slot; `evict` ends that. Raises as `train`.
        """
        (entry,) = self._slots.hold([name])
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
        self._slots.release(self._slots.hold([name]))

    def evict(self, name: str) -> None:
        """Frees the slot of a delta, which stays in the bank. Raises PeftliteError if it's in use.

        What was trained goes to the host; parameters that were given out are the delta's no more.
        """
        self._slots.evict(name, self._store.keep)

    def pin(self, name: str) -> None:
        """Brings a delta into a slot, where it stays until `unpin`. Raises PeftliteError."""
        (entry,) = self._slots.hold([name])
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


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PeftliteError(f"{name} is a positive whole number, not {short(value)}")
