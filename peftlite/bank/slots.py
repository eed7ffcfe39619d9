"""Slots: the first tier of a bank, on the device: who is in which, and who goes when another comes.

    slots ◄── rows on the host, within a budget ◄── the file it came from, or one to spill to

A slot that is held is never filled anew. One lock guards who has which, and is never held over a
copy; who needs a delta that another is bringing waits for that one alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from peftlite.bank.arena import Arena, Row
from peftlite.bank.entry import Arrival, Claim, Entry
from peftlite.errors import PeftliteError
from peftlite.table import listed


class Slots:
    """Holds deltas in slots for those who use them, and brings them in."""

    arena: Arena
    count: int
    fetch: Callable[[Entry], Row]

    def __init__(self, arena: Arena, count: int, fetch: Callable[[Entry], Row]):
        self.arena, self.count, self.fetch = arena, count, fetch
        self.lock: threading.Lock = threading.Lock()
        self.known: dict[str, Entry] = {}
        self.resident: OrderedDict[Entry, None] = OrderedDict()  # the least recently used first
        self.free: list[int] = list(range(count, 0, -1))

    def hold(self, names: Iterable[str]) -> Sequence[Entry]:
        """The entries of distinct names, each in a slot that stays its own until `release`.

        Raises PeftliteError if one isn't known, there are too few slots, or it can't be brought in.
        """
        claim = self.claim(names)
        self.settle(claim)
        return claim.entries

    def bring(self, name: str) -> Entry:
        """The entry of a name, held as by `hold`, though no batch is waiting: that counts nothing.

        Raises PeftliteError.
        """
        with self.lock:
            claim = self._claim([self.entry(name)])
        self.settle(claim)
        return claim.entries[0]

    def claim(self, names: Iterable[str], instead_of: Sequence[Entry] = ()) -> Claim:
        """The first half of `hold`: slots for all, in place of `instead_of`, which are held so far.

        Raises PeftliteError if a name isn't known or there are too few slots; nothing has changed.
        """
        with self.lock:
            claim = self._claim([self.entry(name) for name in names], instead_of)
            for entry in claim.entries:
                if entry in claim.coming:
                    entry.misses += 1
                else:
                    entry.hits += 1
            return claim

    def settle(self, claim: Claim) -> None:
        """The second half: brings in what has to come, and waits for what others bring."""
        try:
            if claim.coming:
                self._bring(claim.coming)
            for arrival in claim.awaited:
                arrival.wait()
            for entry in claim.entries:
                if entry.arrived:
                    self.arena.wait(entry.arrived)
        except BaseException:
            self.release(claim.entries)
            raise

    def seat(self, entry: Entry, needed: bool) -> None:
        """Brings an entry that isn't known yet into a slot; if it isn't needed, where there's room.

        Raises PeftliteError if it is needed and there is none.
        """
        with self.lock:
            if not needed and self._going(1) is None:
                return
            claim = self._claim([entry])
        self.settle(claim)
        self.release([entry])

    def release(self, entries: Sequence[Entry]) -> None:
        """Ends what `hold` began."""
        with self.lock:
            self._release(entries)

    def _release(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            entry.uses -= 1
            if entry.retired and not entry.uses:
                self._vacate(entry)

    def entry(self, name: str) -> Entry:
        """The entry of a name; the lock is held. Raises PeftliteError."""
        entry = self.known.get(name)
        if entry is None:
            there = listed(map(repr, self.known)) or "none yet"
            raise PeftliteError(f"the bank has no delta named {name!r}; it has {there}")
        return entry

    def put(self, entry: Entry) -> Entry | None:
        """Makes an entry known by its name; returns the one it replaces, perhaps still in use."""
        with self.lock:
            old = self.known.get(entry.name)
            if old is not None:
                entry.hits, entry.misses, entry.evictions = old.hits, old.misses, old.evictions
                self._retire(old)
            self.known[entry.name] = entry
            return old

    def drop(self, name: str) -> Entry:
        with self.lock:
            entry = self.entry(name)
            self._retire(entry)
            del self.known[name]
        return entry

    def evict(self, name: str, keep: Callable[[Entry], None]) -> None:
        """Frees the slot of an entry; one that was trained is kept first. Raises PeftliteError."""
        with self.lock:
            entry = self.entry(name)
            if entry.uses:
                raise PeftliteError(f"{name!r} is in use, so it can't leave its slot now")
            if entry.leaves is not None:
                entry.leaves.fill()
                keep(entry)
            entry.evictions += entry.slot is not None
            self._vacate(entry)

    def close(self) -> None:
        """Forgets everything. Raises PeftliteError if something is in use."""
        with self.lock:
            if busy := [entry.name for entry in self.resident if entry.uses]:
                names = listed(map(repr, busy))
                raise PeftliteError(f"{names} in use, so the bank can't be closed")
            for entry in list(self.resident):
                self._vacate(entry)
            self.known.clear()

    def _claim(self, entries: Sequence[Entry], instead_of: Sequence[Entry] = ()) -> Claim:
        awaited = [entry.arrival for entry in entries if entry.arrival is not None]
        coming = [entry for entry in entries if entry.slot is None]
        _count(entries, 1)
        if coming:
            _count(instead_of, -1)
            try:
                self._make_room(len(coming), entries)
            except BaseException:
                _count(entries, -1)
                raise
            finally:
                _count(instead_of, 1)
        self._release(instead_of)
        for entry in coming:
            entry.slot, entry.arrival = self.free.pop(), Arrival()
            self.resident[entry] = None
        for entry in entries:
            self.resident.move_to_end(entry)
        return Claim(entries, coming, awaited)

    def _make_room(self, count: int, entries: Sequence[Entry]) -> None:
        if len(entries) > self.count:
            raise PeftliteError(
                f"{len(entries)} deltas are named, for a bank of {self.count} slots"
            )
        going = self._going(count)
        if going is None:
            there = listed(map(_described, self.resident))
            raise PeftliteError(
                f"{listed(repr(e.name) for e in entries if e.slot is None)} can't have a slot now; "
                f"there are {there}: leave a `with`, unpin or evict one, or make a bank of more "
                "slots"
            )
        for entry in going:
            entry.evictions += 1
            self._vacate(entry)

    def _going(self, count: int) -> list[Entry] | None:
        """Who has to leave a slot so that so many are free; None if not enough can."""
        going: list[Entry] = []
        for entry in self.resident:
            if len(self.free) + len(going) >= count:
                break
            if not _stays(entry):
                going.append(entry)
        return going if len(self.free) + len(going) >= count else None

    def _bring(self, coming: Sequence[Entry]) -> None:
        """Copies rows into the slots that were claimed; if one fails, none of them has come."""
        try:
            for entry in coming:
                assert entry.slot is not None
                entry.arrived = self.arena.fill(entry.slot, self.fetch(entry))
        except BaseException as error:
            with self.lock:
                for entry in coming:
                    arrival = entry.arrival
                    self._vacate(entry)
                    if arrival is not None:
                        arrival.end(error)
            raise
        for entry in coming:
            arrival, entry.arrival = entry.arrival, None
            if arrival is not None:
                arrival.end()

    def _retire(self, entry: Entry) -> None:
        entry.retired = True
        if not entry.uses:
            self._vacate(entry)

    def _vacate(self, entry: Entry) -> None:
        if entry.slot is not None:
            self.free.append(entry.slot)
            del self.resident[entry]
        if entry.leaves is not None:
            entry.leaves.leave()
        entry.slot, entry.arrival, entry.leaves, entry.arrived = None, None, None, []


def _stays(entry: Entry) -> str:
    """Why an entry keeps its slot; nothing if it may go."""
    if entry.uses:
        return "in use"
    return "pinned" if entry.pinned else "in training" if entry.leaves is not None else ""


def state(entry: Entry) -> str:
    """What an entry is about in its slot; nothing without one."""
    return _stays(entry) or ("" if entry.slot is None else "idle")


def _described(entry: Entry) -> str:
    return f"{entry.name!r} ({state(entry)})"


def _count(entries: Iterable[Entry], change: int) -> None:
    for entry in entries:
        entry.uses += change
