"""Fields of a method's dataclass: numbers and choices, each with what it may be beside its default.

    rank: int = integer(8)
    alpha: float | None = positive(None)
    dropout: float = number(0.0, float, lambda p: 0 <= p < 1, "in [0, 1)")
    scaling: Scaling = one_of("alpha/r", Scaling)

A method checks them when it is made. None is allowed where it is the default; a field without a
default is given by its name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from dataclasses import MISSING, field, fields
from typing import Any, get_args

from peftlite.errors import PeftliteError
from peftlite.table import short


def number(default: Any, kind: type, allowed: Callable[[Any], bool], what: str) -> Any:
    """A number of a kind, `allowed` or not, and `what` that is in words, after "must be".

    Raises PeftliteError, as all of these do, when a method is made with anything else.

    Example:
        dropout: float = pl.methods.number(0.0, float, lambda p: 0 <= p < 1, "in [0, 1)")
    """
    return _field(default, lambda method, name: set_number(method, name, kind, allowed, what))


def integer(default: Any = MISSING, least: int = 1) -> Any:
    """A whole number, from `least` up.

    Example:
        rank: int = pl.methods.integer(8)
    """
    return number(default, int, lambda n: n >= least, f"a whole number from {least} up")


def positive(default: Any) -> Any:
    """A number above 0.

    Example:
        alpha: float | None = pl.methods.positive(None)
    """
    return number(default, float, lambda x: 0 < x < math.inf, "finite and above 0")


def one_of(default: Any, literal: Any) -> Any:
    """One of the strings of a `Literal`. Raises PeftliteError when a method has another.

    Example:
        from typing import Literal

        how: str = pl.methods.one_of("fast", Literal["fast", "exact"])
    """
    allowed = get_args(literal)
    return _field(default, lambda method, name: check_given(name, getattr(method, name), allowed))


def _field(default: Any, check: Callable[[Any, str], None]) -> Any:
    if default is MISSING:
        return field(kw_only=True, metadata={"check": check})
    return field(default=default, metadata={"check": check})


def check_fields(method: Any) -> None:
    """Raises PeftliteError if a field of a method isn't what it may be."""
    for each in fields(method):
        check = each.metadata.get("check")
        if isinstance(each.default, bool):
            check_given(each.name, getattr(method, each.name), (True, False))
        elif check is not None and not (each.default is None is getattr(method, each.name)):
            check(method, each.name)


def as_typed(value: Any, but: Collection[str] = ()) -> str:
    """A dataclass as one would type it: its class, and the fields that aren't as by default."""
    given = {e.name: getattr(value, e.name) for e in fields(value) if e.name not in but}
    others = {e.name: e.default for e in fields(value)}
    typed = [f"{name}={own!r}" for name, own in given.items() if own != others[name]]
    return f"{type(value).__name__}({', '.join(typed)})"


def set_number(
    method: Any, name: str, kind: type, allowed: Callable[[Any], bool], what: str
) -> None:
    """Makes a hyperparameter a plain `kind` (a sweep may give NumPy's). Raises PeftliteError."""
    given = getattr(method, name)
    try:
        number = operator.index(given) if kind is int else float(given)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or isinstance(given, bool | str) or not allowed(number):
        raise PeftliteError(f"{name} must be {what}, not {given!r}")
    object.__setattr__(method, name, number)


def check_given(name: str, given: Any, allowed: Collection[Any]) -> None:
    """Raises PeftliteError if an argument, or a hyperparameter, is none of those allowed."""
    if not any(isinstance(given, type(one)) and given == one for one in allowed):
        listed = ", ".join(map(repr, allowed))
        raise PeftliteError(f"{name} must be one of {listed}, not {short(given)}")
