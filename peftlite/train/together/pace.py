"""Pace: how many calls run as one, found by the clock.

What many calls save by being one is what each of them costs however small it is: where cores are
full with one, more of them only leave the caches. So first they run one by one, and then twice as
many at a time, as long as each of them takes less so.
"""

from __future__ import annotations

from collections import defaultdict

TRIES = 2
"""How often a number is timed before it is judged: what is new takes longer the first time."""


class Pace:
    """How many calls of one kind run as one."""

    def __init__(self) -> None:
        self._tries, self._least = defaultdict[int, int](int), dict[int, float]()

    def next(self) -> int:
        """How many are to run as one now: a power of two."""
        best = min(self._least, key=lambda number: (self._least[number], -number), default=1)
        known = (2**i for i in range(best.bit_length() + 1))  # up to twice as many as is best
        return next((number for number in known if self._tries[number] < TRIES), best)

    def note(self, number: int, seconds: float) -> None:
        """Notes how long so many took, for each of them."""
        self._tries[number] += 1
        self._least[number] = min(seconds, self._least.get(number, seconds))
