"""Fingerprints: what the tensors of a base are, so that a delta knows the base it was made for.

    {"dtype": "float32", "shape": [16, 16], "sha256": "…"}    all of a tensor
    {"dtype": "float32", "shape": [16, 16], "sampled": "…"}   4,096 of its entries, evenly spread

A sample is quick, and sees another model; only the whole sees that one weight was touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from peftlite.core.tensors import plain_parts, unshard
from peftlite.io.files import ahead, bytes_of, data_of, sha256

Fingerprint = Literal["sha256", "sampled"]
KINDS = get_args(Fingerprint)

# a base is hashed once: by tensor, its version and checksum when it was, and its digest
_known: Any = WeakTensorKeyDictionary()
_LANES = 1021


def fingerprint(tensor: Tensor, kind: str) -> dict[str, Any]:
    """What a tensor is; `kind` says whether by all of it or by a sample."""
    return next(fingerprints([(tensor, kind)]))


def fingerprints(items: Iterable[tuple[Tensor, str]]) -> Iterator[dict[str, Any]]:
    """What tensors are, each by its kind."""
    # processes gather in the same order: here, and not in the threads
    return ahead(_fingerprint, ((unshard(tensor.detach()), tensor, kind) for tensor, kind in items))


def _fingerprint(item: tuple[Tensor, Tensor, str]) -> dict[str, Any]:
    data, tensor, kind = item
    dtype = str(tensor.dtype).removeprefix("torch.")
    parts = plain_parts(data)
    if parts[0] is data:
        digest = _whole(data, tensor) if kind == "sha256" else _sample(data)
    else:
        digest = _of_parts([(sha256 if kind == "sha256" else _sample)(part) for part in parts])
    return {"dtype": dtype, "shape": list(tensor.shape), kind: digest}


def _of_parts(digests: list[str]) -> str:
    """Of a quantised tensor, which is its codes and their scales."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def kind_of(entry: dict[str, Any]) -> str | None:
    """The kind of a fingerprint in a file; None if it's none."""
    kinds = [kind for kind in KINDS if set(entry) == {"dtype", "shape", kind}]
    return kinds[0] if kinds else None


def difference(theirs: dict[str, Any], mine: dict[str, Any]) -> str | None:
    """How a tensor isn't the one of a fingerprint, as an error adds it; None if it is."""
    differing = [what for what in theirs if mine[what] != theirs[what]]
    if not differing:
        return None
    what = differing[0]
    return f" ({what} {theirs[what]}, here {mine[what]})" if what in ("dtype", "shape") else ""


def _whole(data: Tensor, tensor: Tensor) -> str:
    # writing through `.data` isn't counted as a version
    state = (tensor._version, _checksum(data))
    known = _known.get(tensor)
    if known is None or known[0] != state:
        known = _known[tensor] = (state, sha256(data))
    return known[1]


def _checksum(tensor: Tensor) -> bytes:
    """Sums of all its bits, which no write leaves alike by chance, at an eighth of a hash's cost.

    In lanes, since one sum wouldn't see rows change places; a prime's, since rows fit none.
    """
    data = bytes_of(tensor)
    even = len(data) // (8 * _LANES) * 8 * _LANES
    if data.data_ptr() % 8:
        data = data.clone()
    sums = data[:even].view(torch.int64).view(-1, _LANES).sum(0)
    return bytes(data_of(sums)) + bytes(data_of(data[even:]))


def _sample(tensor: Tensor) -> str:
    flat = tensor.reshape(-1)
    count = min(len(flat), 4096)
    entries = torch.arange(count, device=flat.device) * len(flat) // max(count, 1)
    return hashlib.sha256(data_of(flat[entries])).hexdigest()
