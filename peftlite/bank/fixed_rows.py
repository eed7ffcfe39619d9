"""FixedRows: rows at a fixed address, so that a CUDA graph captured once serves every mix."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from peftlite.bank.batches import Batches
from peftlite.bank.entry import Entry, numbers_of
from peftlite.bank.route import Router
from peftlite.bank.rows import Rows
from peftlite.errors import PeftliteError


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
