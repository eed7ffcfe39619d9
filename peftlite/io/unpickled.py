"""Unpickled: the one place where a pickle is read, of tensors alone."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from peftlite.errors import FileError
from peftlite.io.files import DTYPES, PICKLES, Entry, Tensors, check_regular
from peftlite.table import short, size


class Unpickled(Tensors):
    """A pickle of tensors, as if it were a safetensors file."""

    path: str
    metadata: dict[str, str]
    num_bytes: int

    def __init__(self, path: Path):
        self.path, self.metadata, self.num_bytes = str(path), {}, path.stat().st_size
        found = self._load(path)
        for _ in range(4):  # litgpt's {"model": …}; one that holds itself has no end
            if isinstance(found, dict) and len(found) == 1:
                (inner,) = found.values()
                found = inner if isinstance(inner, dict) else found
        self._tensors = dict(found) if isinstance(found, dict) else {"": found}
        for key, x in self._tensors.items():
            if not isinstance(key, str) or not isinstance(x, Tensor) or not _is_plain(x):
                what = short(x if isinstance(x, int | float | str) else type(x))
                raise FileError(f"{self.path!r} holds {what} as {short(key)}, no plain tensor")
        self.entries: dict[str, Entry] = {k: Entry.of(x) for k, x in self._tensors.items()}
        self._check(sum(map(_bytes, self._tensors.values())))

    def _load(self, path: Path) -> Any:
        try:
            with open(path, "rb") as file:  # by its name torch may take it for something else
                self._check(_unpacked(file))
                return torch.load(file, map_location="cpu", weights_only=True)
        except FileError:
            raise
        except Exception as error:  # there is no end to how one can fail
            raise FileError(
                f"{self.path!r} is neither a safetensors file nor a pickle of tensors alone, and "
                "nothing else is unpickled, since it may run code"
            ) from error

    def _check(self, held: int) -> None:
        """Raises FileError if a file holds more than it can: it names its bytes more than once."""
        if held > 4 * self.num_bytes:  # tied tensors do, up to that often
            raise FileError(
                f"{self.path!r} is of {size(self.num_bytes)}, and would unpack to {size(held)}"
            )

    def get(self, key: str) -> Tensor:
        return self._tensors[key]


def _is_plain(x: Tensor) -> bool:
    strided = x.layout is torch.strided and x.dtype in DTYPES.values() and not x.is_meta
    return strided and _bytes(x) <= x.untyped_storage().nbytes()  # one that is expanded has more


def _bytes(x: Tensor) -> int:
    return x.numel() * x.itemsize


def _unpacked(file: BinaryIO) -> int:
    """How long the parts of an archive are; torch's have them as they are, one beside another."""
    found = 0
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            found = sum(part.file_size for part in archive.infolist())
    file.seek(0)
    return found


def is_pickle(path: Path) -> bool:
    """Whether a file is one of torch.save, now or long ago; safetensors' begin with a length."""
    if not path.is_dir():
        check_regular(str(path))
    try:
        with open(path, "rb") as file:
            return file.read(4) in PICKLES
    except OSError:
        return False
