"""Residual: a tensor kept by what tells it from another, in few bytes, exact to the bit."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from peftlite.core import tensors


class Residual:
    """The XOR of two tensors' bytes, those of one significance together, in a Huffman code.

    Where the two are near, signs, exponents and the leading digits agree, and their bytes are zero.
    """

    def __init__(self, w: Tensor, beside: Tensor):
        planes = _planes(w)
        self._shape, self._crc = planes.shape, zlib.crc32(planes)
        self._keep(planes, _planes(beside))

    def _keep(self, planes: np.ndarray, beside: np.ndarray) -> None:
        coder = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
        self._packed = coder.compress(planes ^ beside) + coder.flush()

    def _put_back(self, planes: np.ndarray) -> None:
        """Makes what was kept of the bytes of what it was kept beside."""
        planes ^= np.frombuffer(zlib.decompress(self._packed), np.uint8).reshape(planes.shape)

    @property
    def nbytes(self) -> int:
        return len(self._packed)

    @torch.no_grad()
    def restore(self, beside: Tensor) -> Tensor:
        """The tensor, from the one beside which it was kept. Raises ValueError if it's another."""
        planes = _planes(beside)
        if planes.shape == self._shape:
            self._put_back(planes)
        if planes.shape != self._shape or zlib.crc32(planes) != self._crc:
            raise ValueError("what a residual was kept beside has changed")
        w = beside.detach().clone()
        local = tensors.local(w)
        data = torch.from_numpy(np.ascontiguousarray(planes.T)).view(w.dtype)
        local.copy_(data.reshape(local.shape))
        return w


class Few(Residual):
    """The entries of a tensor that another has otherwise, and where they are."""

    def _keep(self, planes: np.ndarray, beside: np.ndarray) -> None:
        indices = np.flatnonzero((planes != beside).any(0))
        self._at = indices.astype(np.int32 if planes.shape[1] < 2**31 else np.int64)
        self._entries = planes[:, indices]

    def _put_back(self, planes: np.ndarray) -> None:
        planes[:, self._at] = self._entries

    @property
    def nbytes(self) -> int:
        return self._at.nbytes + self._entries.nbytes


def residual(w: Tensor, beside: Tensor) -> Residual:
    """What keeps a tensor in the fewest bytes."""
    differing = int((tensors.local(w) != tensors.local(beside)).count_nonzero())
    return (Few if 16 * differing < w.numel() else Residual)(w, beside)


def _planes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor as (bytes of an entry, entries)."""
    data = tensors.local(tensor.detach()).cpu().contiguous().reshape(-1, 1)
    return np.array(data.view(torch.uint8).numpy().T, order="C")
