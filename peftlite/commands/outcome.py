"""Outcome: what a command found."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Outcome:
    """What a command found: for a person, for a program, and whether something is amiss."""

    text: str
    data: dict[str, Any] = field(default_factory=dict)
    amiss: bool = False
