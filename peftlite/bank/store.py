"""HostStore: the tiers behind a bank's slots: rows on the host, and on disk behind those.

Only a delta that isn't in a slot needs it, so its lock may be held while a file is written.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from peftlite.bank.arena import Arena, Row
from peftlite.bank.entry import Entry
from peftlite.errors import FileError


class HostStore:
    """Rows on the host, the least recently used of them on disk when they are over the budget.

    Args:
        budget: bytes of the host's memory; all they need if None.
        reread: the row of an entry from its file, for one that was let go.
    """

    arena: Arena
    budget: int | None
    reread: Callable[[Entry], Row]
    num_bytes: int

    def __init__(self, arena: Arena, budget: int | None, reread: Callable[[Entry], Row]):
        self.arena, self.budget, self.reread = arena, budget, reread
        self.num_bytes = 0
        self._lock = threading.Lock()
        self._rows: OrderedDict[Entry, Row] = OrderedDict()
        self._folder: str | None = None

    def fetch(self, entry: Entry) -> Row:
        """The row of an entry, from memory or from disk. Raises FileError."""
        with self._lock:
            row = self._rows.get(entry)
            if row is not None:
                self._rows.move_to_end(entry)
                return row
        row = self._read(entry) if entry.spilled else self.reread(entry)
        self.put(entry, row)
        return row

    def put(self, entry: Entry, row: Row) -> None:
        with self._lock:
            self._forget(entry)
            if entry.retired:
                return
            self._rows[entry] = row
            self.num_bytes += self.arena.row_bytes
            while self.budget is not None and self.num_bytes > self.budget:
                oldest = next(iter(self._rows))
                if oldest.origin is None and oldest.spilled is None:
                    oldest.spilled = self._spill(self._rows[oldest])
                self._forget(oldest)

    def drop(self, entry: Entry) -> None:
        with self._lock:
            self._forget(entry)
            if entry.spilled is not None:
                entry.spilled.unlink(missing_ok=True)
                entry.spilled = None

    def keep(self, entry: Entry) -> None:
        """Copies what was trained of a delta from its slot; from now on that is the delta."""
        assert entry.slot is not None
        self.drop(entry)
        entry.origin = None
        self.put(entry, self.arena.read(entry.slot))

    def close(self) -> None:
        with self._lock:
            self._rows.clear()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self, entry: Entry) -> Row:
        """The row that was spilled. Raises FileError."""
        row = self.arena.blank()
        with open(str(entry.spilled), "rb") as file:
            for part in row:
                if file.readinto(part.numpy()) != len(part):
                    raise FileError(f"{str(entry.spilled)!r}, spilled by a bank, was cut short")
        return row

    def _forget(self, entry: Entry) -> None:
        if self._rows.pop(entry, None) is not None:
            self.num_bytes -= self.arena.row_bytes

    def _spill(self, row: Row) -> Path:
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="peftlite-bank-")
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        file, path = tempfile.mkstemp(dir=self._folder)
        with open(file, "wb") as out:
            for part in row:
                np.asarray(part).tofile(out)
        return Path(path)
