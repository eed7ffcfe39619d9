"""Refusal: why a site of a delta can't be in a peer's file, and what to do about it."""

from __future__ import annotations

from peftlite.core.assign import Placed
from peftlite.errors import PeftliteError


def refusal(item: Placed, into: str, why: str) -> PeftliteError:
    """The error that says so, of a file such as "a PEFT directory"."""
    return PeftliteError(
        f"{item.site.address} can't go into {into}, since {why}: leave it out with exclude=, or "
        "keep the delta with pl.save"
    )
