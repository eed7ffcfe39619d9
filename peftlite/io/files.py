"""Files: written whole or not at all; safetensors read and written one tensor at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

from peftlite.delta import gather
from peftlite.errors import FileError, PeftliteError
from peftlite.table import shown

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """What a file holds under one key."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def meta(self) -> Tensor:
        """A tensor as it, without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def as_path(given: Any) -> Path:
    """A path that a user gave. Raises PeftliteError."""
    if not isinstance(given, str | os.PathLike) or isinstance(os.fspath(given), bytes):
        raise PeftliteError(f"a path is a str or an os.PathLike: not {shown(given)}")
    return Path(given)


# -- writing


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` once its body is done, and is gone if it fails.

    Write, flush to the disk, rename, flush the folder: at no moment is there half a file.
    """
    try:
        path = Path(os.path.realpath(path))  # what a link stands for is replaced, not the link
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise FileError(f"can't write {str(path)!r}: it is {kind}")
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        flush_folder(path.parent)
    except (OSError, ValueError) as error:
        folder = str(path.parent)
        why = reason(error) if os.path.isdir(folder) else f"there is no folder {folder!r}"
        raise FileError(f"can't write {str(path)!r}: {why}") from error


def flush_folder(folder: Path) -> None:
    """Makes the names in a folder last."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_tensors(
    file: BinaryIO,
    entries: Mapping[str, Entry],
    get: Callable[[str], Tensor],
    metadata: Callable[[dict[str, str]], dict[str, str]],
) -> None:
    """Writes a safetensors file, asking for one tensor after another.

    Args:
        metadata: what to put beside the tensors, given their SHA-256; as long whatever they are.
    """
    # the widest first, so that all are aligned
    order = sorted(entries, key=lambda key: (-entries[key].dtype.itemsize, key))

    def head(digests: dict[str, str]) -> bytes:
        table: dict[str, Any] = {"__metadata__": metadata(digests)}
        start = 0
        for key in order:
            dtype, shape = entries[key]
            stop = start + dtype.itemsize * torch.Size(shape).numel()
            table[key] = {
                "dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, stop]
            }  # fmt: skip
            start = stop
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    digests = dict.fromkeys(order, "0" * 64)
    room = len(head(digests))
    file.seek(room)
    for key in order:
        data = data_of(get(key))
        digests[key] = hashlib.sha256(data).hexdigest()
        file.write(data)
    file.seek(0)
    file.write(head(digests))


def data_of(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes in order, without copying where they lie in order already."""
    # a dimension of one may have any stride, and still passes for contiguous
    data = gather(tensor.detach()).cpu().contiguous().reshape(-1)
    return data.view(torch.uint8).numpy() if data.numel() else np.empty(0, np.uint8)


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(data_of(tensor)).hexdigest()


# -- reading


class Tensors:
    """A safetensors file: its metadata and entries at once, its values as they're asked for.

    Raises FileError, also where the file changes between.
    """

    def __init__(self, path: Path):
        self.path = str(path)
        with self._failing():
            self._file = safetensors.safe_open(self.path, framework="pt")
            self.metadata: dict[str, str] = self._file.metadata() or {}
            self.entries: dict[str, Entry] = {}
            for key in sorted(self._file.keys()):
                part = self._file.get_slice(key)
                if (code := part.get_dtype()) not in DTYPES:
                    raise FileError(f"{self.path!r} has {key} as {code}, which torch lacks")
                self.entries[key] = Entry(DTYPES[code], tuple(part.get_shape()))
            self.num_bytes = os.path.getsize(self.path)

    def get(self, key: str) -> Tensor:
        with self._failing():
            return self._file.get_tensor(key)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise FileError(f"there is no file {self.path!r}") from error
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise FileError(
                f"{self.path!r} is no safetensors file, or is damaged: {reason(error)}"
            ) from error


def is_finite(tensor: Tensor) -> bool:
    # a sum is quicker than asking every value, and finite only if all are
    return not tensor.is_floating_point() or bool(
        (tensor.itemsize > 1 and tensor.sum().isfinite()) or tensor.float().isfinite().all()
    )


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


def numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
