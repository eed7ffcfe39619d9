"""Three kinds of real text without a download: Python source, English, and character names."""

from __future__ import annotations

import random
import sysconfig
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peftlite.errors import PeftliteError

MOST = 4_000_000  # bytes to train on, of each kind


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes held out, as uint8."""

    train: Tensor
    held: Tensor


def texts() -> dict[str, Text]:
    """The base learns `code`; the deltas learn `docs` and `names`."""
    return {"code": _split(code()), "docs": _split(docs()), "names": _split(names())}


def code() -> list[bytes]:
    """The modules at the top of the standard library.

    Those in folders are left out: among them are the tests, which some installs lack, and the
    documentation and character names that the base is not to know.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    found = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    if len(found) < 100:
        raise PeftliteError(
            f"the demo reads Python's own source, but {folder} has {len(found)} modules as text; "
            "run it with a Python whose standard library is installed as .py files"
        )
    return found


def docs() -> list[bytes]:
    """The topics of `help()`, by paragraph; a paragraph that several topics quote comes once."""
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics[key] for key in sorted(topics)).split("\n\n")
    return [f"{paragraph}\n\n".encode() for paragraph in dict.fromkeys(paragraphs)]


def names() -> list[bytes]:
    """Unicode's character names, shuffled, less those that only spell out the code point."""
    points = list(range(0x110000))
    random.Random(0).shuffle(points)
    pairs = ((point, unicodedata.name(chr(point), "")) for point in points)
    return [f"{name}\n".encode() for point, name in pairs if name and f"{point:X}" not in name]


def _split(pieces: list[bytes]) -> Text:
    """The last tenth of the pieces is held out: no piece is on both sides."""
    cut = len(pieces) * 9 // 10
    return Text(_tensor(pieces[:cut]), _tensor(pieces[cut:]))


def _tensor(pieces: Iterable[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(pieces)[:MOST]), dtype=torch.uint8)
