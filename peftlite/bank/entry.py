"""Entry: a delta of a bank wherever it is, what brings it, and who waits for it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from peftlite.bank.source import Origin
from peftlite.bank.training import Leaves
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


class Claim(NamedTuple):
    """Entries that are held, those of them that the holder brings in, and those others bring."""

    held: Sequence[Entry]
    coming: Sequence[Entry]
    awaited: Sequence[Arrival]


@dataclass(eq=False)
class Entry:
    """A delta of a bank, wherever it is."""

    name: str
    made: Sequence[tuple[Method, Sequence[Site]]]  # what it was built by
    source: Origin | None = None  # None where there is no file, or it was trained since
    slot: int | None = None
    arrival: Arrival | None = None
    arrived: list[torch.cuda.Event] = field(default_factory=list)
    uses: int = 0
    pinned: bool = False
    retired: bool = False  # dropped or replaced, and perhaps still in use
    spilled: Path | None = None
    leaves: Leaves | None = None  # on its slot's memory, while it is trained
