"""Entry: a delta of a bank, wherever it is; what brings it, and what those wait for who need it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from peftlite.bank.source import Origin
from peftlite.bank.training import Leaves
from peftlite.core.assign import Placed
from peftlite.core.delta import Delta
from peftlite.core.patch import Method
from peftlite.core.site import Site
from peftlite.errors import PeftliteError


class Arrival:
    """A row on its way into a slot, for those who wait for it."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._error: BaseException | None = None

    def end(self, error: BaseException | None = None) -> None:
        self._error = error
        self._done.set()

    def wait(self) -> None:
        self._done.wait()
        if self._error is not None:
            raise PeftliteError(f"the delta could not be brought in: {self._error}")


@dataclass(eq=False)
class Entry:
    """A delta of a bank, wherever it is."""

    name: str
    built_by: Sequence[tuple[Method, Sequence[Site]]]
    origin: Origin | None = None  # None where there is no file, or it was trained since
    slot: int | None = None
    arrival: Arrival | None = None
    arrived: list[torch.cuda.Event] = field(default_factory=list)
    uses: int = 0
    pinned: bool = False
    retired: bool = False  # dropped or replaced, and perhaps still in use
    spilled: Path | None = None
    leaves: Leaves | None = None  # on its slot's memory, while it is trained
    hits: int = 0  # batches that found it in a slot
    misses: int = 0  # batches that had to bring it in
    evictions: int = 0  # times it left its slot

    @classmethod
    def of(cls, name: str, delta: Delta, origin: Origin | None, pinned: bool) -> Entry:
        built_by = [(how, [item.site for item in placed]) for how, placed in delta.by_method()]
        return cls(name, built_by, origin, pinned=pinned)

    def placed(self, on: str | None = None) -> list[Placed]:
        """Patches such as the delta was made of, without values."""
        return [
            item
            for method, sites in self.built_by
            for item in Placed.all([replace(site, on=on) for site in sites], method)
        ]


class Claim(NamedTuple):
    """Entries that are held, those of them that the holder brings in, and those others bring."""

    entries: Sequence[Entry]
    coming: Sequence[Entry]
    awaited: Sequence[Arrival]


def numbers_of(names: Sequence[str | None], entries: Sequence[Entry]) -> tuple[int, ...]:
    """The slot of each row, where all that the rows name is held; 0 is the base's."""
    slots: dict[str | None, int] = {None: 0}
    for entry in entries:
        slots[entry.name] = entry.slot or 0
    return tuple([slots[name] for name in names])
