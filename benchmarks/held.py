"""What a process holds of the machine's memory, now and at most."""

from __future__ import annotations

import gc
import re
import resource
import sys
from pathlib import Path

_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident() -> int:
    """The bytes that this process holds now: fewer than as it imported others' libraries."""
    gc.collect()
    return _told("VmRSS")


def most() -> int:
    """The most that it has held, so far or since `forget`."""
    return _told("VmHWM")


def forget() -> None:
    """From now on the most that was held is what is held now."""
    if _REFERENCES.exists():
        _REFERENCES.write_text("5")


def _told(what: str) -> int:
    """Bytes, as Linux tells them; elsewhere the most that getrusage has.

    On Linux that counts what the process that started this one held as well.
    """
    if _STATUS.exists() and (found := re.search(rf"{what}:\s*(\d+) kB", _STATUS.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
