"""Checkpoint: a model's tensors on disk, in one safetensors file or in the shards of a folder."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from peftlite.errors import FileError, reason
from peftlite.io.files import Entry, Tensors, as_path, data_of, read_json, replacing
from peftlite.io.folders import replacing_folder
from peftlite.table import listed, short

INDEX = ".safetensors.index.json"
_MOST_STEPS = 200  # of a tensor's name; modules are walked by calls within calls
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.safetensors")
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf)(\.index\.json)?")


class Checkpoint(Mapping[str, Tensor]):
    """A model's tensors by name; each lies in its file until it is used.

    Args:
        path: a safetensors file; a folder as `save_pretrained` leaves it, or the index in it.

    Raises FileError.
    """

    def __init__(self, path: str | os.PathLike[str]):
        path = as_path(path)
        if path.name.endswith(INDEX):
            path = path.parent
        self.path = path
        self.folder: Path | None = path if path.is_dir() else None
        self.files: list[Tensors] = [
            Tensors(file) for file in (_shards(path) if self.folder else [path])
        ]
        self._home = {key: file for file in self.files for key in file.entries}
        if len(self._home) < sum(len(file.entries) for file in self.files):
            raise FileError(f"{str(path)!r} has a tensor in two of its files")
        if deep := next((key for key in self._home if key.count(".") > _MOST_STEPS), None):
            raise FileError(
                f"{str(path)!r} has a tensor named {deep[:40]}… of {deep.count('.') + 1:,} steps, "
                "and no model is so deep"
            )

    def __getitem__(self, key: str) -> Tensor:
        return self._home[key].get(key)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """What is in the config.json beside the tensors; nothing if there is none to read."""
        try:
            data = read_json((self.folder or self.path.parent) / "config.json")
        except (FileError, OSError, ValueError, RecursionError):
            return {}
        return data if isinstance(data, dict) else {}

    def entry(self, key: str) -> Entry:
        """A tensor's dtype and shape, its values not looked at."""
        return self._home[key].entries[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, its values not looked at."""
        return self.entry(key).shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def rewrite(
        self, out: str | os.PathLike[str], change: Callable[[str], Tensor | None], advance: Any
    ) -> None:
        """Writes a checkpoint like this one, of as many files, but for the tensors that change.

        All else stays byte for byte: headers, the order of the tensors, and what else is in the
        folder but weights of other formats. It is there whole or not at all.

        Args:
            change: a tensor's new values, of its dtype and shape; None if it stays.
            advance: called with the bytes that were written since it was.
        """
        out = as_path(out)
        if self.folder is None:
            if out.exists() and self.path.samefile(out):
                raise FileError(f"{str(out)!r} is the base itself: give the result another name")
            with replacing(out) as file:
                _rewrite(self.files[0], file, change, advance)
            return
        with replacing_folder(out, _taken) as temporary:
            for tensors in self.files:
                with replacing(temporary / Path(tensors.path).name) as file:
                    _rewrite(tensors, file, change, advance)
            for other in sorted(self.folder.iterdir()):
                if other.is_file() and comes_along(other.name):
                    shutil.copyfile(other, temporary / other.name)


def comes_along(name: str) -> bool:
    """Whether a file in a checkpoint's folder is no weights of another format."""
    return name.endswith(INDEX) or not _WEIGHTS.fullmatch(name)


def _taken(names: set[str]) -> str | None:
    return "it is there already; name a new folder" if names else None


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index names, or the only one."""
    found = sorted(path.name for path in folder.iterdir())
    indices = [name for name in found if name.endswith(INDEX)]
    files = [name for name in found if name.endswith(".safetensors")]
    if len(indices) > 1 or (not indices and len(files) != 1):
        raise FileError(
            f"{str(folder)!r} has {listed(indices or files) or 'no safetensors file'}: name the "
            "one that holds the model"
        )
    if not indices:
        return [folder / files[0]]
    index = str(folder / indices[0])
    try:
        names = {*read_json(Path(index))["weight_map"].values()}
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise FileError(f"{index!r} is no index of a checkpoint: {reason(error)}") from error
    for name in names:
        # a name, and no path to a file elsewhere
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise FileError(
                f"{index!r} names {short(name)}, which is no name of a safetensors file"
            )
    return [folder / name for name in sorted(names)]


def _rewrite(
    tensors: Tensors,
    out: BinaryIO,
    change: Callable[[str], Tensor | None],
    advance: Callable[[int], Any],
) -> None:
    with open(tensors.path, "rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        header = json.loads(source.read(length))
        header.pop("__metadata__", None)
        spans = sorted((*its["data_offsets"], key) for key, its in header.items())
        source.seek(0)
        _copy(source, out, 8 + length, advance)
        for start, stop, key in spans:
            if _put(change(key), out):
                source.seek(stop - start, os.SEEK_CUR)
                advance(stop - start)
            else:
                _copy(source, out, stop - start, advance)


def _put(value: Tensor | None, out: BinaryIO) -> bool:
    """Writes a tensor, if there is one; it is let go before the next is made."""
    if value is not None:
        out.write(data_of(value))
    return value is not None


def _copy(source: BinaryIO, out: BinaryIO, count: int, advance: Callable[[int], Any]) -> None:
    while count:
        data = source.read(min(count, 1 << 20))
        if not data:
            raise FileError(f"{source.name!r} became shorter while it was read")
        out.write(data)
        advance(len(data))
        count -= len(data)
