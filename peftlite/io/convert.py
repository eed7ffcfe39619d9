"""convert: a delta's file in another format; the one place where a pickle is read, tensors only."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import torch
from torch import Tensor, nn

from peftlite.core.attach import deltas, detach
from peftlite.errors import FileError, PeftliteError
from peftlite.fields import check_given
from peftlite.io.export import export
from peftlite.io.files import (
    DTYPES,
    Entry,
    Tensors,
    as_path,
    check_regular,
    replacing,
    write_tensors,
)
from peftlite.io.load import load
from peftlite.io.native import save
from peftlite.io.peers import FORMATS
from peftlite.io.peers.peer import ALPHA, PARTS
from peftlite.io.peers.reading import Reading
from peftlite.table import short, size

To = Literal["safetensors", "peftlite", "peft", "kohya", "diffusers"]


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: To = "safetensors",
    *,
    model: nn.Module | None = None,
    alpha: float | None = None,
    parts: Sequence[str] = (),
) -> None:
    """Writes a delta's file in another format.

    Args:
        path: what `load` reads, or such a file as a pickle (.pt, .pth, .bin).
        to: "safetensors" leaves the tensors and their names as they are, in no pickle, with α and
            the parts said. The others are the formats of `save` and `export`.
        model: the base with its weights, for all but "safetensors"; it is as it was in the end.
        alpha: α, for files that don't say it: loralib's, litgpt's, torchtune's, minLoRA's.
        parts: which parts of fused weights have changes, in order, for loralib's MergedLinear and
            litgpt's qkv: what an address has in its brackets, ["q", "v"] or ["0:64", "80:96"].

    Raises:
        FileError: the file is no delta, is damaged, or doesn't fit the model.
        PeftliteError: the format has nothing that is this delta, or an argument isn't of these.
    """
    check_given("to", to, get_args(To))
    source, target = as_path(path), as_path(out)
    if to == "safetensors":
        return _rewrite(source, target, alpha, parts)
    if model is None:
        raise PeftliteError(
            f"{to!r} goes by a model: give it with model=, or convert to 'safetensors', which "
            "leaves names as they are"
        )
    if deltas(model):
        raise PeftliteError("convert takes a model without deltas: pl.detach them first")
    with tempfile.TemporaryDirectory() as folder:
        if alpha is not None or parts or _is_pickle(source):
            source, given = Path(folder) / "delta.safetensors", source
            _rewrite(given, source, alpha, parts)
        delta = load(model, source)
        try:
            save(delta, target) if to == "peftlite" else export(delta, target, to)
        finally:
            detach(model, delta.name)


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


def _is_pickle(path: Path) -> bool:
    """Whether a file is one of torch.save, now or long ago; safetensors' begin with a length."""
    if not path.is_dir():
        check_regular(str(path))
    try:
        with open(path, "rb") as file:
            return file.read(4) in (b"PK\x03\x04", b"\x80\x02\x8a\x0a")
    except OSError:
        return False


def _rewrite(source: Path, target: Path, alpha: float | None, parts: Sequence[str]) -> None:
    """Writes tensors as they are, with what is to be said beside them."""
    file = Unpickled(source) if _is_pickle(source) else Tensors(source)
    peer = next((each.peer for each in FORMATS if each.recognises(source, file)), None)
    said = {} if alpha is None else {ALPHA: str(alpha)}
    said |= {PARTS: json.dumps(list(parts))} if parts else {}
    if said and (peer is None or peer.alpha is not None):
        raise PeftliteError(
            f"alpha= and parts= are for files that don't say them, and {file.path!r} is "
            f"{f'of {peer.name}' if peer else 'of no such format'}"
        )
    file.metadata |= said
    if peer is not None:
        Reading(peer, file)
    with replacing(target) as out:
        write_tensors(out, file.entries, file.get, lambda _: {"format": "pt", **file.metadata})
