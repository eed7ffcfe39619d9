"""Batches: the deltas that a batch names, checked, and held in their slots while it runs."""

from __future__ import annotations

from collections.abc import Sequence

from peftlite.bank.arena import Arena
from peftlite.bank.entry import Entry, numbers_of
from peftlite.bank.room import NAME
from peftlite.bank.rows import Rows
from peftlite.bank.slots import Slots
from peftlite.core.choice import Choice
from peftlite.errors import PeftliteError
from peftlite.table import short

_KEPT = 1024  # batches whose rows are kept as tensors, for when they come again


class Batches:
    """Gives a batch its rows, for names of deltas that the bank has."""

    def __init__(self, slots: Slots, arena: Arena, choice: Choice):
        self.slots, self.arena, self.choice = slots, arena, choice
        self.closed = False
        self._rows: dict[tuple[int, ...], Rows] = {}

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

    def rows(self, numbers: tuple[int, ...]) -> Rows:
        """Rows of these slots, kept as tensors."""
        rows = self._rows.get(numbers)
        if rows is None:
            if len(self._rows) >= _KEPT:
                self._rows.clear()
            rows = self._rows[numbers] = Rows.of(numbers)
        return rows
