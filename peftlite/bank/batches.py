"""Batches: the deltas that a batch names, checked, and held in their slots while it runs.

FixedRows: rows at a fixed address, so that a CUDA graph captured once serves every mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from peftlite.bank.arena import Arena
from peftlite.bank.entry import Entry, numbers_of
from peftlite.bank.room import NAME
from peftlite.bank.route import Router
from peftlite.bank.rows import Rows
from peftlite.bank.slots import Slots
from peftlite.core.choice import Choice
from peftlite.errors import PeftliteError
from peftlite.table import short

_KEPT = 1024  # batches whose rows are kept as tensors, for when they come again


class Batches:
    """Gives a batch its rows, for names of deltas that the bank has."""

    slots: Slots
    arena: Arena
    choice: Choice

    def __init__(self, slots: Slots, arena: Arena, choice: Choice):
        self.slots, self.arena, self.choice = slots, arena, choice
        self.closed = False
        self._rows: dict[tuple[tuple[int, ...], int], Rows] = {}

    def distinct(self, names: Sequence[str | None]) -> list[str]:
        """The deltas of a batch. Raises PeftliteError if it is none, or not for the bank."""
        if not isinstance(names, list | tuple) or not names:
            raise PeftliteError(f"rows are a list, a name or None for each: not {short(names)}")
        chosen = self.choice.now()
        if not isinstance(chosen, tuple) or NAME not in chosen:
            how = "closed" if self.closed else f"not the model's choice: pl.use(model, {NAME!r})"
            raise PeftliteError(f"the bank is {how}")
        return [name for name in dict.fromkeys(names) if name is not None]

    def hold(self, names: Sequence[str | None]) -> tuple[Sequence[Entry], tuple[int, ...]]:
        """Keeps the deltas of a batch in their slots until `release`; and the slot of each row."""
        entries = self.slots.hold(self.distinct(names))
        return entries, numbers_of(names, entries)

    def release(self, entries: Sequence[Entry]) -> None:
        """Ends what `hold` began."""
        self.arena.leave([entry.slot or 0 for entry in entries])
        self.slots.release(entries)

    def rows(self, numbers: tuple[int, ...], repeat: int) -> Rows:
        """Rows of these slots, kept as tensors."""
        rows = self._rows.get((numbers, repeat))
        if rows is None:
            if len(self._rows) >= _KEPT:
                self._rows.clear()
            rows = self._rows[numbers, repeat] = Rows.of(numbers, repeat)
        return rows


class FixedRows:
    """The rows of a batch in a tensor of their own, which changes in place; the base's until `set`.

    Its deltas stay in their slots until the next `set`. A `with` puts it in force in this context,
    as a graph is captured or a model is run.
    """

    def __init__(self, b: int, batches: Batches, router: Router):
        self._batches, self._router = batches, router
        self._entries: Sequence[Entry] = []
        device = batches.arena.devices[0]
        self._rows = Rows(torch.zeros(b, dtype=torch.int64, device=device))
        self._open: list[AbstractContextManager[None]] = []

    @property
    def slots(self) -> torch.Tensor:
        """(b,) int64: the slot of each row, at one address for good."""
        return self._rows.slots

    def set(self, names: Sequence[str | None]) -> None:
        """Gives row j the delta `names[j]` in what the device runs next.

        Raises PeftliteError: the rows are as they were; the base's, if a file couldn't be read.
        """
        distinct = self._batches.distinct(names)
        if len(names) != len(self.slots):
            raise PeftliteError(f"{len(names)} rows were named, and there are {len(self.slots)}")
        arena, slots = self._batches.arena, self._batches.slots
        arena.leave([entry.slot or 0 for entry in self._entries])
        claim = slots.claim(distinct, instead_of=self._entries)
        try:
            slots.settle(claim)
        except BaseException:
            self._entries = []
            self.slots.zero_()
            raise
        self._entries = claim.entries
        for entry in claim.entries:
            if entry.leaves is not None:
                entry.leaves.fill()
        numbers = torch.tensor(numbers_of(names, claim.entries), device="cpu")
        self.slots.copy_(numbers, non_blocking=True)

    def close(self) -> None:
        """Lets its deltas go; its rows are the base's."""
        self.set([None] * len(self.slots))

    def __enter__(self) -> FixedRows:
        self._open.append(self._router.scope(self._rows))
        self._open[-1].__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.pop().__exit__(None, None, None)
