"""Features: what kind of CPU this is, as Linux says."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

_INFO = Path("/proc/cpuinfo")


@functools.cache
def vendor_and_flags() -> tuple[str, frozenset[str]]:
    """Whose CPU it is, and what it can do: nothing where it isn't an x86 of 64 bits on Linux."""
    if platform.machine() != "x86_64" or not _INFO.exists():
        return platform.machine(), frozenset()
    info = _INFO.read_text()
    vendor = re.search(r"^vendor_id\s*: (\S+)", info, re.M)
    flags = re.search(r"^flags\s*: (.*)", info, re.M)
    return vendor[1] if vendor else "", frozenset(flags[1].split() if flags else ())
