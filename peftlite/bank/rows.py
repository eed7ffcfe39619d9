"""Rows: which slot of a bank every row of a batch takes, and how equal ones lie together."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Run = tuple[int, int, int]
"""A slot, and the rows from start to stop that take it."""

Tables = dict[str, Tensor]


def side_by_side(slots: Sequence[int]) -> slice | None:
    """Where slots lie one after another in a table, which can be viewed; None if they don't."""
    if not slots or list(slots) != list(range(slots[0], slots[0] + len(slots))):
        return None
    return slice(slots[0], slots[0] + len(slots))


class Groups(NamedTuple):
    """Rows by the slot they share, in groups of one size m.

    Args:
        slots: of the n groups: a slice where they lie side by side, so that tables are viewed.
        rows: (n·m,) of the batch; shorter groups are padded with their last one.
        unpadded: which of those are no padding; None where all are.
    """

    slots: slice | Tensor
    rows: Tensor
    unpadded: Tensor | None

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Groups:
        rows: dict[int, list[int]] = {}
        for slot, start, stop in sorted(runs):
            rows.setdefault(slot, []).extend(range(start, stop))
        m = max(map(len, rows.values()), default=0)
        real = [i * m + j for i, own in enumerate(rows.values()) for j in range(len(own))]
        with torch.inference_mode(False):
            slots: Any = side_by_side(list(rows))
            if slots is None:
                slots = torch.tensor(list(rows), device="cpu")
            padded = [row for own in rows.values() for row in own + own[-1:] * (m - len(own))]
            unpadded = torch.tensor(real, device="cpu") if len(real) < len(padded) else None
            return cls(slots, torch.tensor(padded, device="cpu"), unpadded)


class Rows:
    """The slot of each row; what the host knows of them; and whose tables they index.

    Args:
        slots: (b,) indices into the first dimension of the tables.
        runs: the rows that aren't the base's, in stretches that share a slot; None in a compiled
            graph, where only the device knows.
        tables: of a site, if not those of the arena: in training, they are made of parameters.
        repeat: how many rows of a batch, one after another, share each of these.
        lies: whether those tables have a row for each of these, in their order.
        numbers: the slot in the arena of each row of a batch, where `slots` are of other tables.
    """

    slots: Tensor
    runs: tuple[Run, ...] | None
    tables: Callable[[Any], Tables] | None
    repeat: int
    lies: bool
    numbers: Tensor

    def __init__(
        self,
        slots: Tensor,
        runs: tuple[Run, ...] | None = None,
        tables: Callable[[Any], Tables] | None = None,
        repeat: int = 1,
        lies: bool = False,
        numbers: Tensor | None = None,
    ):
        self.slots, self.runs, self.tables, self.repeat = slots, runs, tables, repeat
        self.lies, self.numbers = lies, slots if numbers is None else numbers
        self._elsewhere: dict[torch.device, Rows] = {}

    @classmethod
    def of(cls, slots: Sequence[int], repeat: int = 1) -> Rows:
        """Rows by the numbers of their slots, as the host has them."""
        runs, start = [], 0
        for slot, group in itertools.groupby(slots):
            stop = start + len(list(group))
            if slot:
                runs.append((slot, start, stop))
            start = stop
        with torch.inference_mode(False):  # it's kept, and may be asked for with gradients
            return cls(torch.tensor(slots, device="cpu"), tuple(runs), repeat=repeat)

    @functools.cached_property
    def groups(self) -> Groups:
        """The rows that aren't the base's, brought together by their slots."""
        return Groups.of(self.runs or ())

    @functools.cached_property
    def known(self) -> tuple[Tensor, Tensor]:
        """The slots that aren't the base's, and which of them each row has, or -1."""
        slots = sorted({slot for slot, _, _ in self.runs or ()})
        at = {slot: k for k, slot in enumerate(slots)}
        order = [at.get(slot, -1) for slot in self.slots.tolist()]
        with torch.inference_mode(False):
            return torch.tensor(slots, device="cpu"), torch.tensor(order, device="cpu")

    @property
    def places(self) -> Tensor:
        """Where the tables have what each row of a batch takes; -1 for the base."""
        times = len(self.numbers) // len(self.slots)
        return torch.where(self.numbers > 0, self.slots.repeat_interleave(times), -1)

    def by_slot(self) -> dict[int, list[int]]:
        """The rows that take each slot, as it is now."""
        found: dict[int, list[int]] = {}
        for row, slot in enumerate(self.numbers.tolist()):
            found.setdefault(slot, []).append(row)
        return found

    def on(self, device: torch.device) -> Rows:
        """The same where a site's tensors are."""
        if self.slots.device == device:
            return self
        if device not in self._elsewhere:
            with torch.inference_mode(False):
                slots, numbers = self.slots.to(device), self.numbers.to(device)
            own = self.runs, self.tables, self.repeat, self.lies, numbers
            self._elsewhere[device] = Rows(slots, *own)
        return self._elsewhere[device]


class ByToken(Rows):
    """Rows whose tokens are on their way to experts, and are told one by one."""

    @classmethod
    def like(cls, rows: Rows) -> ByToken:
        own = rows.tables, rows.repeat, rows.lies, rows.numbers
        return cls(rows.slots, rows.runs, *own)
