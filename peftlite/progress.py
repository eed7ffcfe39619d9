"""Progress: a bar where somebody looks, and in a file a line every so often."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm

EVERY = 10.0
"""Seconds from one line to the next, or a twentieth of the time so far: a day has some 140."""


class Lines(tqdm):
    """A bar that is written to a file: a line every so often, and one at the end."""

    due: float

    def __init__(self, *args: Any, **options: Any) -> None:
        self.due = EVERY
        super().__init__(*args, mininterval=EVERY, maxinterval=EVERY, **options)
        part = "{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}"
        so_far = "{n_fmt} [{elapsed}" if self.total is None else part
        self.bar_format: str | None = f"{{desc}}: {so_far}, {{rate_fmt}}{{postfix}}]"

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Writes a line, if one is due. tqdm gives `pos` at the end, and ends that line itself."""
        elapsed = self.format_dict["elapsed"]
        if msg is None and (pos is not None or elapsed >= self.due):
            self.due = elapsed + max(EVERY, elapsed / 20)
            self.fp.write(f"{self}" if pos is not None else f"{self}\n")
            self.fp.flush()


def bar(items: Iterable[Any] | None, label: str, **options: Any) -> Any:
    """tqdm's bar, with its options: on a terminal, in a notebook, or as lines of a file."""
    if sys.stderr.isatty():
        kind = tqdm
    elif "ipykernel" in sys.modules and find_spec("ipywidgets"):
        from tqdm.notebook import tqdm as kind
    else:
        kind = Lines
    return kind(items, label, **options)
