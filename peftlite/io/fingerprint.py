"""Fingerprints: what the tensors of a base are, so that a delta knows the base it was made for.

    {"dtype": "float32", "shape": [16, 16], "sha256": "…"}    all of a tensor
    {"dtype": "float32", "shape": [16, 16], "sampled": "…"}   4,096 of its entries, evenly spread

A sample is quick, and sees another model; only the whole sees that one weight was touched.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from peftlite.delta import gather
from peftlite.io.files import data_of, sha256

Fingerprint = Literal["sha256", "sampled"]
KINDS = get_args(Fingerprint)

# a base is hashed once: by tensor, its version and checksum when it was, and its digest
_known: Any = WeakTensorKeyDictionary()
_LANES = 1021


def fingerprint(tensor: Tensor, kind: str) -> dict[str, Any]:
    """What a tensor is; `kind` says whether by all of it or by a sample."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    digest = _whole(tensor) if kind == "sha256" else _sample(tensor)
    return {"dtype": dtype, "shape": list(tensor.shape), kind: digest}


def kind_of(entry: dict[str, Any]) -> str | None:
    """The kind of a fingerprint in a file; None if it's none."""
    kinds = [kind for kind in KINDS if set(entry) == {"dtype", "shape", kind}]
    return kinds[0] if kinds else None


def _whole(tensor: Tensor) -> str:
    # writing through `.data` isn't counted as a version
    state = (tensor._version, _checksum(tensor))
    held = _known.get(tensor)
    if held is None or held[0] != state:
        held = _known[tensor] = (state, sha256(tensor))
    return held[1]


def _checksum(tensor: Tensor) -> tuple[list[int], bytes]:
    """Sums of all its bits, which no write leaves alike by chance, at an eighth of a hash's cost.

    In lanes, since one sum wouldn't see rows change places; a prime's, since rows fit none.
    """
    data = gather(tensor.detach()).contiguous().reshape(-1)
    data = data.view(torch.uint8) if data.numel() else data.new_empty(0, dtype=torch.uint8)
    whole = len(data) // (8 * _LANES) * 8 * _LANES
    if data.data_ptr() % 8:
        data = data.clone()
    sums = data[:whole].view(torch.int64).view(-1, _LANES).sum(0)
    return sums.tolist(), bytes(data[whole:].tolist())


def _sample(tensor: Tensor) -> str:
    flat = gather(tensor.detach()).reshape(-1)
    count = min(len(flat), 4096)
    at = torch.arange(count, device=flat.device) * len(flat) // max(count, 1)
    return hashlib.sha256(data_of(flat[at])).hexdigest()
