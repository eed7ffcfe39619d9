"""Files: written whole or not at all; safetensors read and written one tensor at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import stat
import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import safetensors
import torch
from torch import Tensor

from peftlite.core.tensors import unshard
from peftlite.errors import FileError, PeftliteError, reason
from peftlite.table import short, size

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
PICKLES = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")  # torch.save's, now and long ago
_PICKLE = (
    "a pickle, which may run code as it is read: `peftlite convert FILE new.safetensors` makes a "
    "safetensors file of its tensors"
)
BEGINNINGS = (
    *dict.fromkeys(PICKLES, _PICKLE).items(),
    (b"GGUF", "a file of llama.cpp's: give what it was made from"),
    (b"<", "a page of the web, no safetensors file: download it again"),
)
"""How files of other kinds begin, and what they are."""
POINTER = b"version https://git-lfs"
# what comes of asking odd tensors and metadata for what they should have
_ODD = (PeftliteError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
_FLUSH = 2**24  # bytes, that are worth a flush of their own
T = TypeVar("T")
R = TypeVar("R")
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """What a file holds under one key."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def meta(self) -> Tensor:
        """A tensor as it, without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * numel(self.shape)

    @property
    def plain(self) -> dict[str, Any]:
        """As JSON says it."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape)}


def as_path(given: Any) -> Path:
    """A path that a user gave. Raises PeftliteError."""
    if not isinstance(given, str | os.PathLike) or isinstance(os.fspath(given), bytes):
        raise PeftliteError(f"a path is a str or an os.PathLike: not {short(given)}")
    try:
        os.stat(given)
    except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError):
        pass  # which is said where it's opened
    except OSError as error:
        raise FileError(f"{os.fspath(given)!r} can't be a path: {reason(error)}") from error
    return Path(given)


def as_json(name: str, given: Any) -> dict[str, Any]:
    """What a user gave to be kept as JSON. Raises PeftliteError."""
    try:
        kept = json.loads(json.dumps(given, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        kept = None
    if not isinstance(kept, dict) or kept != given:
        raise PeftliteError(f"{name} must be a dict that JSON can hold, not {short(given)}")
    return kept


# -- writing


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` once its body is done, and is gone if it fails.

    Write, flush to the disk, rename, flush the folder: at no moment is there half a file.
    """
    with writing_to(path) as path:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise FileError(f"can't write {str(path)!r}: it is {kind}")
        _collect(path)
        with _temporary(path) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if fcntl is None:
                    file.close()  # an open file can't be renamed on Windows
                os.replace(file.name, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(file.name)
                raise
        flush_folder(path.parent)


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[Path]:
    """What is to be written to: what a link stands for, not the link. Raises FileError."""
    try:
        path = Path(os.path.realpath(path))
        yield path
    except (OSError, ValueError) as error:
        folder = str(path.parent)
        why = reason(error) if os.path.isdir(folder) else f"there is no folder {folder!r}"
        raise FileError(f"can't write {str(path)!r}: {why}") from error


def _temporary(path: Path) -> BinaryIO:
    """A new file beside `path`, locked for as long as it is open."""
    while True:
        file = open(path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp"), "xb")
        if fcntl is not None:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.lexists(file.name):
            return file
        file.close()  # it was collected before it was locked


def _collect(path: Path) -> None:
    """Deletes the temporary files of `path` that killed processes left: those that none locks."""
    if fcntl is None:
        return
    left = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.tmp")
    for name in filter(left.fullmatch, os.listdir(path.parent)):
        with contextlib.suppress(OSError), open(path.with_name(name), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(file.name)


@contextlib.contextmanager
def locking(folder: Path) -> Iterator[bool]:
    """A folder that is locked for as long as this lasts; False where it is locked already."""
    if fcntl is None:
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = True
    except OSError as error:
        ours = not isinstance(error, BlockingIOError)  # some file systems have no locks
    try:
        yield ours
    finally:
        if ours:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # also for children that have the handle
        os.close(handle)


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
    digests = dict.fromkeys(entries, "0" * 64)
    file.seek(len(_head(entries, metadata(digests))))
    parts = ((key, data_of(get(key))) for key in _order(entries))
    with _flushing(file) as flush:
        for key, data, digest in ahead(lambda part: (*part, hashlib.sha256(part[1])), parts):
            digests[key] = digest.hexdigest()
            file.write(data)
            flush(data.nbytes)
    file.seek(0)
    file.write(_head(entries, metadata(digests)))


@contextlib.contextmanager
def _flushing(file: BinaryIO) -> Iterator[Callable[[int], None]]:
    """To be told of bytes that are written: has the disk take them while there are more to come."""
    left, running = 0, Future()
    running.set_result(None)

    def written(count: int) -> None:
        nonlocal left, running
        left += count
        if left >= _FLUSH and running.done():
            running.result()
            with contextlib.suppress(RuntimeError):  # as Python ends, no thread begins
                left, running = 0, pool.submit(os.fsync, file.fileno())

    with ThreadPoolExecutor(1) as pool:
        yield written
        running.result()


def placing(
    file: BinaryIO, entries: Mapping[str, Entry], metadata: Mapping[str, str]
) -> dict[str, int]:
    """Writes all of a safetensors file but its tensors; returns where the bytes of each go."""
    head = _head(entries, metadata)
    file.write(head)
    places, start = {}, len(head)
    for key in _order(entries):
        places[key] = start
        start += entries[key].num_bytes
    file.truncate(start)
    return places


def write_json(path: Path, data: Any) -> None:
    """Writes JSON, whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(data, indent=2).encode())


def write_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors that are all at hand to a safetensors file, whole or not at all."""
    entries = {key: Entry.of(tensor) for key, tensor in tensors.items()}
    with replacing(path) as file:
        write_tensors(file, entries, tensors.__getitem__, lambda _: dict(metadata or {}))


def _head(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """All of a safetensors file that comes before the tensors."""
    table: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for key in _order(entries):
        dtype, shape = entries[key]
        stop = start + dtype.itemsize * numel(shape)
        table[key] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _order(entries: Mapping[str, Entry]) -> list[str]:
    # the widest first, so that all are aligned
    return sorted(entries, key=lambda key: (-entries[key].dtype.itemsize, key))


def ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """What a function gives of each item, in order, worked out by two threads a few items ahead.

    Hashing and copying let other threads run, and the disk can wait for neither.
    """
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(2) as pool:
        for item in items:
            try:
                waiting.append(pool.submit(function, item))
            except RuntimeError:  # no threads begin while Python ends, as in an `atexit` handler
                waiting.append(Future())
                waiting[-1].set_result(function(item))
            if len(waiting) > 4:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def data_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes in order, without copying where they lie in order already."""
    return bytes_of(unshard(tensor.detach()).cpu()).numpy().data


def bytes_of(tensor: Tensor) -> Tensor:
    """A tensor's bytes in order, where it is."""
    data = tensor.contiguous().reshape(-1)
    if data.numel() < 2:  # which may have any stride, and still passes for contiguous
        data = data.clone().as_strided(data.shape, (1,))
    return data.view(torch.uint8) if data.numel() else data.new_empty(0, dtype=torch.uint8)


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(data_of(tensor)).hexdigest()


# -- reading


def check_regular(path: str, most: float = math.inf) -> None:
    """Raises FileError if what is at a path, if anything, is none to be read: a pipe, a pointer."""
    with contextlib.suppress(OSError, ValueError):
        its = os.stat(path)
        if not stat.S_ISREG(its.st_mode):
            kind = "a folder" if stat.S_ISDIR(its.st_mode) else "a pipe, a socket or a device"
            raise FileError(f"{path!r} is {kind}, no file")
        if its.st_size > most:
            raise FileError(
                f"{path!r} has {size(its.st_size)}, where {size(int(most))} is the most"
            )
        with open(path, "rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise FileError(
                    f"{path!r} is git-lfs's pointer to a file that wasn't fetched: type git lfs "
                    "pull in its folder"
                )


def read_json(path: Path, **options: Any) -> Any:
    """What a small file of JSON says. Raises FileError, OSError, ValueError, RecursionError."""
    check_regular(str(path), 2**26)
    return json.loads(path.read_bytes(), **options)


class Tensors:
    """A safetensors file: its metadata and entries at once, its values as they're asked for.

    Raises FileError, also where the file changes between.
    """

    def __init__(self, path: Path):
        self.path: str = str(path)
        check_regular(self.path)
        with self._failing():
            file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            weakref.finalize(self, os.close, file)
            # not a map of the file, which ends the process where another one cuts the file short
            self._file = FileIO(file, closefd=False)
            self._lock = threading.Lock()
            with safetensors.safe_open(self.path, framework="pt") as checked:
                self.metadata: dict[str, str] = checked.metadata() or {}
                self.entries: dict[str, Entry] = {}
                for key in sorted(checked.keys()):
                    part = checked.get_slice(key)
                    if (code := part.get_dtype()) not in DTYPES:
                        raise FileError(f"{self.path!r} has {key} as {code}, which torch lacks")
                    self.entries[key] = Entry(DTYPES[code], tuple(part.get_shape()))
            self.num_bytes: int = os.fstat(file).st_size
            (length,) = struct.unpack("<Q", self._file.read(8))
            head = json.loads(self._file.read(length))
            self._places = {
                key: (entry, 8 + length + head[key]["data_offsets"][0])
                for key, entry in self.entries.items()
            }

    def get(self, key: str) -> Tensor:
        (dtype, shape), begin = self._places[key]
        data = torch.empty(numel(shape) * dtype.itemsize, dtype=torch.uint8, device="cpu")
        left = data.numpy().data
        with self._failing(), self._lock:
            self._file.seek(begin)
            while left and (count := self._file.readinto(left)):
                left = left[count:]
        if left:
            raise FileError(f"{self.path!r} was cut short while it was read: get it again")
        return data.view(dtype).reshape(shape)

    @property
    def is_as_written(self) -> bool:
        """Whether its header is, to the byte, what `write_tensors` makes of what it says."""
        head = _head(self.entries, self.metadata)
        with self._failing(), open(self.path, "rb") as file:
            return file.read(len(head)) == head

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise FileError(f"there is no file {self.path!r}") from error
        except (safetensors.SafetensorError, struct.error, OSError, ValueError) as error:
            what = f"no safetensors file, or is damaged: {reason(error)}"
            with contextlib.suppress(OSError, ValueError), open(self.path, "rb") as file:
                start = file.read(16)
                what = next((its for known, its in BEGINNINGS if start.startswith(known)), what)
            raise FileError(f"{self.path!r} is {what}") from error


def is_finite(tensor: Tensor) -> bool:
    # a sum is quicker than asking every value, and finite only if all are
    return not tensor.is_floating_point() or bool(
        (tensor.itemsize > 1 and tensor.sum().isfinite()) or tensor.float().isfinite().all()
    )


@contextlib.contextmanager
def fitting(name: str, refuse: Callable[[str], FileError]) -> Iterator[None]:
    """Says which module's odd tensors or settings are none of what they should be."""
    try:
        yield
    except FileError:
        raise
    except _ODD as error:
        raise refuse(f"{name} can't be: {reason(error)}") from error


def numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
