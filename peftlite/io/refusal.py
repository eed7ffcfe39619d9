"""Refusal: why a site of a delta can't be in a peer's file, and what to do about it."""

from __future__ import annotations

from peftlite.core.assign import Placed
from peftlite.core.site import Site
from peftlite.errors import PeftliteError
from peftlite.table import listed


def refusal(item: Placed, into: str, why: str) -> PeftliteError:
    """The error that says so, of a file such as "a PEFT directory"."""
    return PeftliteError(
        f"{item.site.address} can't go into {into}, since {why}: leave it out with exclude=, or "
        "keep the delta with pl.save"
    )


def not_by_itself(site: Site) -> str | None:
    """Why a weight can't be in a file of changed modules: it's of several, or has no values."""
    if len(site.owners) > 1:
        return f"it is tied to {listed(site.names[1:])}"
    return "it is on the meta device and has no values" if site.whole.is_meta else None
