"""DeltaBank: many deltas on one model, mixed row by row, and swapped without a pause."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from peftlite.bank.entry import Entry
from peftlite.bank.fixed_rows import Static
from peftlite.bank.room import Stock, made
from peftlite.bank.route import Router
from peftlite.bank.rows import Rows
from peftlite.bank.slots import Slots, numbers_of
from peftlite.bank.source import delta_of
from peftlite.bank.training import training_rows
from peftlite.core.assign import methods_in
from peftlite.core.attach import check_model, check_name, commit, detach
from peftlite.core.delta import Delta
from peftlite.core.find import require
from peftlite.core.patch import Method
from peftlite.errors import PeftliteError
from peftlite.io.load import CheckBase
from peftlite.io.native import save
from peftlite.methods.lora import LoRA
from peftlite.table import short, size

NAME = "(bank)"
"""What the bank's patches are called in the model: no name that a user can give a delta."""

_KEPT = 1024  # batches whose rows are kept as tensors, for when they come again


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
        given = [LoRA(rank=max_rank)] if methods is None else methods_in(methods)
        self.model, self._router, self.closed = model, Router(), False
        self._stock = Stock(model, given, slots, max_rank, memory_budget, self._router)
        self._arena, self._shelf = self._stock.arena, self._stock.shelf
        self._slots = Slots(self._arena, slots, self._stock.fetch)
        self._rows: dict[tuple[int, ...], Rows] = {}
        commit(model, self._stock.patches(NAME))
        self._choice = require(model)[1].choice

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
        """
        check_name(name)
        delta, origin = delta_of(self.model, name, source, check_base)
        entry = Entry(name, made(delta), origin, pinned=pin)
        self._shelf.put(entry, self._stock.row(delta))
        try:
            self._slots.seat(entry, needed=pin)
        except BaseException:
            self._shelf.drop(entry)
            raise
        if (old := self._slots.put(entry)) is not None:
            self._shelf.drop(old)

    @property
    def names(self) -> list[str]:
        """The deltas that it has, wherever they are."""
        return list(self._slots.known)

    def __repr__(self) -> str:
        slots, a_slot = self._slots, size(self._arena.row_bytes)
        return (
            f"DeltaBank({len(slots.known)} deltas, {len(slots.resident)} in {slots.count} slots of "
            f"{a_slot}, {size(self._shelf.num_bytes)} on the host)"
        )

    # -- who uses it

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """A `with` in which row j of a batch has the delta `names[j]`; None is the base.

        It holds for this thread or async task, and its deltas stay in their slots. A batch of
        k·len(names) rows has k of them for each name, as a beam search makes them. Raises
        PeftliteError.
        """
        held, numbers = self._hold(names)
        try:
            with self._router.scope(self._rows_of(numbers)):
                yield
        finally:
            self._release(held)

    def use(self, name: str | None) -> AbstractContextManager[None]:
        """A `with` in which every row has the delta `name`, as `rows` has it."""
        return self.rows((name,))

    def static(self, b: int) -> Static:
        """`b` rows that can be changed in place, so that one CUDA graph serves every mix.

        rows = bank.static(64)
        with rows, torch.cuda.graph(graph):
            y = model(x)
        rows.set(names)
        graph.replay()

        Raises PeftliteError if `b` is no positive whole number.
        """
        _positive("b", b)
        return Static(self, b, self._arena.devices[0])

    def _hold(self, names: Sequence[str | None]) -> tuple[Sequence[Entry], tuple[int, ...]]:
        """Keeps the deltas of a batch in their slots until `_release`; and the slot of each row."""
        held = self._slots.hold(self._distinct(names))
        return held, numbers_of(names, held)

    def _distinct(self, names: Sequence[str | None]) -> list[str]:
        """The deltas of a batch. Raises PeftliteError if it is none, or not for the bank."""
        if not isinstance(names, list | tuple) or not names:
            raise PeftliteError(f"rows are a list, a name or None for each: not {short(names)}")
        chosen: Any = self._choice.now()
        if NAME not in chosen:
            how = "closed" if self.closed else f"not the model's choice: pl.use(model, {NAME!r})"
            raise PeftliteError(f"the bank is {how}")
        return [name for name in dict.fromkeys(names) if name is not None]

    def _release(self, held: Sequence[Entry]) -> None:
        self._arena.leave([entry.slot for entry in held])
        self._slots.release(held)

    def _rows_of(self, numbers: tuple[int, ...]) -> Rows:
        rows = self._rows.get(numbers)
        if rows is None:
            if len(self._rows) >= _KEPT:
                self._rows.clear()
            rows = self._rows[numbers] = Rows.of(numbers)
        return rows

    # -- training

    @contextmanager
    def train(self, names: Sequence[str | None]) -> Iterator[None]:
        """A `with` like `rows`, in which row j's loss has gradients for the delta `names[j]` alone.

        Sum the rows' losses: each delta learns as it would alone. Put the backward pass inside.
        Raises PeftliteError.
        """
        held, numbers = self._hold(names)
        try:
            leaves = {entry.slot or 0: self._stock.leaves(entry) for entry in held}
            with self._router.scope(training_rows(numbers, leaves)):
                yield
        finally:
            self._release(held)

    def named_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of a delta as `address:name`, on its slot's memory.

        While it trains it keeps its slot; `evict` ends that. Raises PeftliteError.
        """
        held = self._slots.hold([name])
        try:
            return iter(self._stock.leaves(held[0]).named.items())
        finally:
            self._slots.release(held)

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of a delta, for an optimizer, as `named_parameters` has them."""
        return (parameter for _, parameter in self.named_parameters(name))

    def delta(self, name: str) -> Delta:
        """A delta as it is now, attached to nothing. Raises PeftliteError.

        What isn't its tensors in a slot (a VeRA's, for one) can't be had back: keep its file.
        """
        with self._slots.lock:
            entry = self._slots.entry(name)
            # in training it keeps its slot, and there alone is what it has learned
            row = self._arena.read(entry.slot or 0) if entry.leaves else None
        return self._stock.delta(entry, self._stock.fetch(entry) if row is None else row)

    def save(self, name: str, path: str | os.PathLike[str], **options: Any) -> None:
        """Writes a delta as it is now to a file, as `pl.save` does with its options."""
        save(self.delta(name), path, **options)

    # -- where it is

    def prefetch(self, name: str) -> None:
        """Brings a delta into a slot, on CUDA while other work goes on. Raises PeftliteError."""
        self._slots.release(self._slots.hold([name]))

    def evict(self, name: str) -> None:
        """Frees the slot of a delta, which stays in the bank. Raises PeftliteError if it's in use.

        What was trained is kept, and parameters that were given out are the delta's no more.
        """
        self._slots.evict(name, self._stock.keep)

    def pin(self, name: str) -> None:
        """Brings a delta into a slot, where it stays until `unpin`. Raises PeftliteError."""
        (entry,) = held = self._slots.hold([name])
        entry.pinned = True
        self._slots.release(held)

    def unpin(self, name: str) -> None:
        """Lets a delta go from its slot when others need one. Raises PeftliteError."""
        with self._slots.lock:
            self._slots.entry(name).pinned = False

    def drop(self, name: str) -> None:
        """Forgets a delta; what uses it keeps it to its end. Raises PeftliteError."""
        self._shelf.drop(self._slots.drop(name))

    def close(self) -> None:
        """Takes the bank off the model, which is as it was. Raises PeftliteError if it's in use."""
        if self.closed:
            return
        self._slots.close()
        detach(self.model, NAME)
        self._shelf.close()
        self.closed = True

    def __enter__(self) -> DeltaBank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PeftliteError(f"{name} is a positive whole number, not {short(value)}")
