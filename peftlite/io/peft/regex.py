"""Regexes: a file's regular expressions, followed without backtracking, and not without end.

A part of a regex leads from positions in a text to positions, and a set of positions is one number,
a bit for each: where a backtracking matcher would try one way after the other, all are taken at
once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

if sys.version_info >= (3, 11):
    from re import _parser
else:
    import sre_parse as _parser

_FOLLOWED = re.UNICODE | re.IGNORECASE | re.DOTALL | re.VERBOSE
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
}
_CATEGORIES |= {
    name.replace("_", "_NOT_"): lambda c, its=its: not its(c) for name, its in _CATEGORIES.items()
}


class Regexes:
    """Regular expressions, matched in so many steps at most, all of them together."""

    def __init__(self, steps: int = 4_000_000):
        self._steps = steps
        self._known: dict[str, Any] = {}

    def matches(self, pattern: str, text: str) -> bool:
        """Whether all of a text, of one line, is matched. Raises ValueError if it can't be said."""
        known = self._known.get(pattern)
        if known is None:
            known = self._known[pattern] = _parsed(pattern)
        if isinstance(known, re.Pattern):
            return known.fullmatch(text) is not None
        ignoring = bool(known.state.flags & re.IGNORECASE)
        return _Text(text, ignoring, self._step).all_of(known) >> len(text) & 1 == 1

    def _step(self) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise ValueError("its regexes take too long to follow")


def _parsed(pattern: str) -> Any:
    try:
        # without a choice there is nothing to go back to
        if not set(pattern.removeprefix(r"(.*\.)?")) & set("*+?{|"):
            return re.compile(pattern)
        parsed = _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{error} in a regex") from error
    return refuse("a flag") if parsed.state.flags & ~_FOLLOWED else parsed


def refuse(what: str) -> NoReturn:
    raise ValueError(f"{what} isn't followed here")


class _Text:
    """A text, and where in it the parts of one regex lead. Sets of positions are numbers."""

    def __init__(self, text: str, ignoring: bool, step: Callable[[], None]):
        self.text, self.ignoring, self.step = text, ignoring, step
        self.at: dict[str, int] = {}
        for i, c in enumerate(text):
            self.at[c] = self.at.get(c, 0) | 1 << i
        self.every = (1 << len(text)) - 1
        self._sets: dict[int, int] = {}

    def all_of(self, items: Iterable[Any], start: int = 1) -> int:
        """Where a sequence of parts leads."""
        for code, its in items:
            if not start:
                break
            self.step()
            name = repr(code).lower()
            follow = getattr(self, f"_{name}", None) or refuse(name)
            start = follow(its, start)
        return start

    # -- one character

    def _literal(self, its: int, start: int) -> int:
        return (start & self._is(chr(its))) << 1

    def _not_literal(self, its: int, start: int) -> int:
        return (start & self.every & ~self._is(chr(its))) << 1

    def _any(self, its: None, start: int) -> int:
        return (start & self.every) << 1

    def _in(self, its: Any, start: int) -> int:
        found = self._sets.get(id(its))
        if found is None:
            inverse = repr(its[0][0]) == "NEGATE"
            found = self._where(lambda c: any(_is(part, c) for part in its))
            found = self._sets[id(its)] = self.every & ~found if inverse else found
        return (start & found) << 1

    def _is(self, c: str) -> int:
        """Where a character is."""
        return self._where(lambda own: own == c) if self.ignoring else self.at.get(c, 0)

    def _where(self, test: Callable[[str], bool]) -> int:
        """Where a character is that passes."""
        cases = (str, str.lower, str.upper) if self.ignoring else (str,)
        return sum(at for c, at in self.at.items() if any(test(case(c)) for case in cases))

    # -- several

    def _branch(self, its: Any, start: int) -> int:
        found = 0
        for branch in its[1]:
            found |= self.all_of(branch, start)
        return found

    def _subpattern(self, its: Any, start: int) -> int:
        _, flags, without, items = its
        return refuse("a flag") if flags or without else self.all_of(items, start)

    def _max_repeat(self, its: Any, start: int) -> int:
        least, most, items = its
        # nothing changes any more once there were as many as there are characters
        longest = len(self.text) + 1
        for _ in range(min(int(least), longest)):
            start = self.all_of(items, start)
        found = new = start
        for _ in range(min(int(most) - int(least), longest)):
            if not new:
                break
            new = self.all_of(items, new) & ~found
            found |= new
        return found

    _min_repeat = _max_repeat

    # -- none

    def _at(self, its: Any, start: int) -> int:
        name = repr(its)
        if name.startswith("AT_BEGINNING"):
            return start & 1
        if name.startswith("AT_END"):
            return start & self.every + 1
        word = self._where(_CATEGORIES["CATEGORY_WORD"])
        edges = word ^ word << 1
        return start & (edges if name == "AT_BOUNDARY" else ~edges)

    def _assert(self, its: Any, start: int) -> int:
        direction, items = its
        ends = [1 << i for i in range(len(self.text) + 1) if start >> i & 1]
        if direction > 0:
            return sum(end for end in ends if self.all_of(items, end))
        # what is behind may begin anywhere
        return self.all_of(items, 2 * self.every + 1) & start

    def _assert_not(self, its: Any, start: int) -> int:
        return start & ~self._assert(its, start)


def _is(part: Any, c: str) -> bool:
    """Whether a character is of a part of a set."""
    code, its = part
    match repr(code):
        case "LITERAL":
            return c == chr(its)
        case "RANGE":
            return its[0] <= ord(c) <= its[1]
        case "CATEGORY":
            return _CATEGORIES[repr(its)](c)
    return False
