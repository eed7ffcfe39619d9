"""Residual: a tensor kept by what tells it from another, compressed, exact to the bit."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor


class Residual:
    """The XOR of two tensors' bytes, those of one significance together, in a Huffman code.

    Where the two are near, signs, exponents and the leading digits agree, and their bytes are zero.
    """

    def __init__(self, w: Tensor, beside: Tensor):
        planes = _planes(w)
        coder = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
        self._packed = coder.compress(planes ^ _planes(beside)) + coder.flush()
        self._crc = zlib.crc32(planes)

    @property
    def nbytes(self) -> int:
        return len(self._packed)

    @torch.no_grad()
    def restore(self, beside: Tensor) -> Tensor:
        """The tensor, from the one beside which it was kept. Raises ValueError if it's another."""
        planes = _planes(beside)
        xor = np.frombuffer(zlib.decompress(self._packed), np.uint8)
        if xor.size == planes.size:
            planes ^= xor.reshape(planes.shape)
        if xor.size != planes.size or zlib.crc32(planes) != self._crc:
            raise ValueError("what a residual was kept beside has changed")
        w = beside.detach().clone()
        local = _local(w)
        data = torch.from_numpy(np.ascontiguousarray(planes.T)).view(w.dtype)
        local.copy_(data.reshape(local.shape))
        return w


def _planes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor as (bytes of an entry, entries)."""
    data = _local(tensor.detach()).cpu().contiguous().reshape(-1, 1).view(torch.uint8).numpy()
    return np.array(data.T, order="C")


def _local(tensor: Tensor) -> Tensor:
    """What of a tensor is in this process."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
