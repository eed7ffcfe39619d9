"""Pace: how many calls run as one, found by the clock.

What many calls save by being one is what each of them costs however small it is: where cores are
full with one, more of them only leave the caches. So first they run one by one, and then four times
as many at a time, as long as each of them takes less so.
"""

from __future__ import annotations

TRIES = 2
"""How often a number is timed, the least of which counts: what is new takes longer at first."""


class Pace:
    """How many calls of one kind run as one."""

    def __init__(self) -> None:
        self._seconds: dict[int, list[float]] = {}

    def next(self) -> int:
        """How many are to run as one now: a power of four."""
        number = 1
        while len(self._seconds.get(number, ())) == TRIES:
            if number > 1 and min(self._seconds[number]) > min(self._seconds[number // 4]):
                return number // 4
            number *= 4
        return number

    def note(self, number: int, seconds: float) -> None:
        """Notes how long so many took, for each of them."""
        tries = self._seconds.setdefault(number, [])
        if len(tries) < TRIES:
            tries.append(seconds)
