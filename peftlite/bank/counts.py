"""Counts: how often a bank's deltas were in a slot when they were named, came in, and left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from peftlite.bank.entry import Entry
from peftlite.table import Shown, table


@dataclass(frozen=True, repr=False)
class Counts(Shown):
    """How often each delta of a bank was in a slot when it was named; it prints as a table.

    Attributes:
        hits: times that a batch named it and it was in a slot, by name.
        misses: times that a batch named it and it had to be brought in.
        evictions: times that it left its slot, for another or by `evict`.
    """

    hits: dict[str, int]
    misses: dict[str, int]
    evictions: dict[str, int]

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Counts:
        """Those of entries, as they are now."""
        found = [(e.name, e.hits, e.misses, e.evictions) for e in entries]
        return cls(*({name: row[i] for name, *row in found} for i in range(3)))

    @property
    def hit_rate(self) -> float | None:
        """hits / (hits + misses), of all deltas together; None before the first batch."""
        hits = sum(self.hits.values())
        named = hits + sum(self.misses.values())
        return hits / named if named else None

    def _summary(self) -> str:
        sums = ", ".join(f"{name} {sum(each.values()):,}" for name, each in vars(self).items())
        return sums if self.hit_rate is None else f"{sums}; {self.hit_rate:.1%} hits"

    def _lines(self) -> Iterator[str]:
        counts = (self.hits, self.misses, self.evictions)
        rows = [[name, *(f"{each[name]:,}" for each in counts)] for name in self.hits]
        yield table(["delta", "hits", "misses", "evictions"], rows)
        yield self._summary()
