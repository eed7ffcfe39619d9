"""Dropout's zeros by mask.c: in one go, where plain torch takes ten operations."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_long, c_uint64, c_void_p
from typing import Any

import torch
from torch import Tensor

from peftlite.kernels import reference
from peftlite.kernels.native.kernel import Kernel, is_plain, threads


class _Rows(ctypes.Structure):
    """`struct Rows`."""

    _fields_ = [
        ("at", c_void_p),
        ("from", c_void_p),
        *((name, c_long) for name in ("rows", "columns", "first", "bytes")),
        ("seed", c_uint64),
        ("threshold", c_long),
    ]


def drops(*rows: Tensor) -> bool:
    """Whether it's done here for tensors such as these."""
    return all(x.element_size() in (2, 4) for x in rows) and is_plain(*rows) and KERNEL.ready()


def drop(to: Tensor, x: Tensor, first: int, dropout: float, seed: int) -> Tensor:
    """x (t, i) with the zeros of the rows from `first` on, in the memory of `to`, or its own."""
    _drop(KERNEL.lib, to, x, first, dropout, seed)
    return to


def _drop(lib: Any, to: Tensor, x: Tensor, first: int, dropout: float, seed: int) -> None:
    how = first, x.element_size(), seed, reference.threshold(dropout)
    lib.drop(ctypes.byref(_Rows(to.data_ptr(), x.data_ptr(), *x.shape, *how)), c_int(threads()))


def _agrees(lib: Any) -> bool:
    """Whether the mask of a few rows is the reference's."""
    seed = torch.tensor(2**61 + 2**31, device="cpu")
    true = reference.keep(seed, 40, 1100, 0.25)[3:]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(37, 1100, dtype=dtype, device="cpu")
        to = torch.empty_like(x)
        _drop(lib, to, x, 3, 0.25, int(seed.item()))
        if not torch.equal(to, true.to(dtype)):
            return False
    return True


KERNEL = Kernel(
    name="mask",
    needs=("avx2",),
    flags=("-mavx2",),
    ran=("GenuineIntel", "AuthenticAMD"),
    does="dropout's zeros are put in place, in one go",
    agrees=_agrees,
)
