"""Static: rows that change in place, so that a CUDA graph captured once serves every mix."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from peftlite.bank.entry import Entry
from peftlite.bank.rows import Rows
from peftlite.bank.slots import numbers_of
from peftlite.errors import PeftliteError

if TYPE_CHECKING:
    from peftlite.bank.bank import DeltaBank


class Static:
    """The rows of a batch in a tensor of their own; the base's until `set`.

    Its deltas stay in their slots until the next `set`. A `with` puts it in force in this context,
    as a graph is captured or a model is run.
    """

    def __init__(self, bank: DeltaBank, b: int, device: torch.device):
        self._bank = bank
        self._held: Sequence[Entry] = []
        self._rows = Rows(torch.zeros(b, dtype=torch.int64, device=device))
        self._open: list[AbstractContextManager[None]] = []

    @property
    def slots(self) -> torch.Tensor:
        """(b,) the slot of each row, at one address for good."""
        return self._rows.slots

    def set(self, names: Sequence[str | None]) -> None:
        """Gives row j the delta `names[j]` in what the device runs next.

        Raises PeftliteError: the rows are as they were; the base's, if a file couldn't be read.
        """
        bank, slots = self._bank, self._bank._slots
        distinct = bank._distinct(names)
        if len(names) != len(self.slots):
            raise PeftliteError(f"{len(names)} rows were named, and there are {len(self.slots)}")
        bank._arena.leave([entry.slot or 0 for entry in self._held])
        claim = slots.claim(distinct, instead_of=self._held)
        try:
            slots.settle(claim)
        except BaseException:
            self._held = []
            self.slots.zero_()
            raise
        self._held = claim.held
        self.slots.copy_(
            torch.tensor(numbers_of(names, claim.held), device="cpu"), non_blocking=True
        )

    def close(self) -> None:
        """Lets its deltas go; its rows are the base's."""
        self.set([None] * len(self.slots))

    def __enter__(self) -> Static:
        self._open.append(self._bank._router.scope(self._rows))
        self._open[-1].__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.pop().__exit__(None, None, None)
