"""Peers' files that are one list of tensors: kohya and LyCORIS, diffusers, loralib and its like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from peftlite.core.delta import Delta
from peftlite.core.site import Site
from peftlite.io.content import Content, Info, told
from peftlite.io.files import Tensors
from peftlite.io.peers import writing
from peftlite.io.peers.peer import PEERS, Peer
from peftlite.io.peers.reading import Reading


@dataclass(frozen=True)
class Format:
    """A peer's file, read and written as those of every format are."""

    peer: Peer

    def recognises(self, path: Path, file: Tensors | None) -> bool:
        """Whether a file (None: it's a folder) is of this format, going by what it holds."""
        named = filter(None, map(self.peer.split, file.entries if file else ()))
        return any(name not in self.peer.alone for _, name in named)

    def open(self, path: Path) -> Tensors:
        """A file's tensors and metadata. Raises FileError."""
        return Tensors(path)

    def inspect(self, path: Path) -> Info:
        """What a file says, its values not looked at. Raises FileError."""
        reading = Reading(self.peer, self.open(path))
        return Info(
            name="default",
            methods=list(reading.methods.items()),
            tensors=told(reading.file.entries),
            num_bytes=reading.file.num_bytes,
            format=self.peer.name,
        )

    def read(self, path: Path, model: nn.Module, sites: Sequence[Site]) -> Content:
        """A file's content; each tensor is read as it is asked for. Raises FileError."""
        reading = Reading(self.peer, self.open(path), sites)
        return Content("default", list(reading.methods.items()), reading.entries, reading.get)

    def write(self, delta: Delta, path: Path, settings: Mapping[str, Any] | None = None) -> None:
        """Writes a delta as a file that the peer loads, with `settings` for its metadata."""
        writing.write(self.peer, delta, path, settings or {})


FORMATS = tuple(map(Format, PEERS))
KOHYA, DIFFUSERS = FORMATS[:2]
