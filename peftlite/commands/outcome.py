"""Outcome: what a command found."""

from dataclasses import dataclass, field
from typing import Any

INTERRUPTED, CUT_OFF = 130, 141
"""Exit codes, as shells have them: after Ctrl-C, and where whoever read the output is gone."""


@dataclass
class Outcome:
    """What a command found: for a person, for a program, and whether something is amiss."""

    text: str
    data: dict[str, Any] = field(default_factory=dict)
    amiss: bool = False
