"""Formats: which of those known a file or a folder is of, by what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import nn

from peftlite.core.site import Site
from peftlite.errors import FileError
from peftlite.io import adapterhub, mlx, native, peers, peft
from peftlite.io.content import Content, Info
from peftlite.io.files import Tensors
from peftlite.table import listed


class Format(Protocol):
    """One library's files: a module, or an object, with these functions."""

    def recognises(self, path: Path, file: Tensors | None) -> bool:
        """Whether a file (None: it's a folder) is of this format, going by what it holds."""
        ...

    def inspect(self, path: Path) -> Info:
        """What a file says, its values not looked at. Raises FileError."""
        ...

    def read(self, path: Path, model: nn.Module, sites: Sequence[Site]) -> Content:
        """A file's content, for a model with these sites. Raises FileError."""
        ...


FORMATS: tuple[Format, ...] = (native, mlx.FOLDER, adapterhub, peft, *peers.FORMATS)


def format_of(path: Path) -> Format:
    """The format of a file or a folder. Raises FileError if it's of none."""
    file = None if path.is_dir() else Tensors(path)
    for format in FORMATS:
        if format.recognises(path, file):
            return format
    if file is None:
        raise FileError(f"{str(path)!r} is a folder: name the file in it")
    names = listed([*file.metadata, *file.entries]) or "nothing"
    raise FileError(f"{file.path!r} is no delta of a known format; it holds {names}")
