"""The operations of `torch_ops` in C, with factors, h and dh in fp32.

x and y are in bf16, by low_rank.c or half.c, or in fp32, by single.c. What doesn't fit goes by
plain torch.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_float, c_int, c_long, c_uint64, c_void_p
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftlite.kernels import passes, reference, torch_ops
from peftlite.kernels.native.kernel import Kernel, is_memory, pointer, threads
from peftlite.kernels.workspace import address

SIDE, COLUMNS, _PARTS, _BLOCK, RANK = 16, 32, 3, 64, 64  # as in C
_TILE = 1024  # bytes
_CACHED = 1 << 17  # numbers of a few rows
_HERE = sys.modules[__name__]


class Rows(ctypes.Structure):
    """`struct Rows`."""

    _fields_ = [
        ("at", c_void_p),
        ("order", c_void_p),
        *((name, c_long) for name in ("tokens", "columns", "stride")),
        ("seed", c_uint64),
        ("threshold", c_long),
    ]


class Factor(ctypes.Structure):
    """`struct Factor`."""

    _fields_ = [("at", c_void_p), ("by_rank", c_long), ("by_other", c_long)]


# `struct Forward` and `struct Backward`: many objects of ctypes would take longer than their call
_Forward, _Backward, _NOTHING = c_long * 24, c_long * 40, (0,) * 7


def shrink(x: Tensor, a: Tensor, scale: float, dropout: float, seed: Tensor | None) -> Tensor:
    """h = s·drop(x) Aᵀ, (t, r)."""
    if not _fits(x, a.shape[0], dropout, a):
        return torch_ops.shrink(x, a, scale, dropout, seed)
    return _reduce(_lib(x), x, a, None, reference.scaled(scale, dropout), dropout, seed)[0]


def grad_ab(
    dy: Tensor, h: Tensor, b: Tensor, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """dh (t, r) = s·dY B and dB (o, r) = dYᵀ h, for an h that is scaled."""
    if not _fits(dy, h.shape[1], 0.0, b, h):
        return torch_ops.grad_ab(dy, h, b, scale, dropout)
    dh, g = _reduce(_lib(dy), dy, b.t(), h.t(), reference.scaled(scale, dropout), 0.0, None)
    return dh, g.t()


def grad_a(dh: Tensor, x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """dA = dhᵀ drop(x), for a dh that is scaled."""
    if not _fits(x, dh.shape[1], dropout, dh):
        return torch_ops.grad_a(dh, x, dropout, seed)
    return _reduce(_lib(x), x, None, dh.t(), 1.0, dropout, seed)[1]


def add(y: Tensor, h: Tensor, up: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """y (t, o) += h U, or drop(h U) for an h (t, r) that is scaled, in place."""
    # without a mask BLAS adds as fast in fp32
    blas = y.dtype is torch.float32 and not dropout
    if blas or not _fits(y, up.shape[0], dropout, up, h):
        return torch_ops.add(y, h, up, dropout, seed)
    _expand(_lib(y), y, h.t(), up, dropout, seed)
    return y


product = partial(torch_ops.product, into=add)
expand = partial(torch_ops.expand, into=add)


def forward(
    x: Tensor,
    w: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`passes.forward`: beside the large product, one call, for Python is cold after that."""
    if w is None or not _is_whole(x, b.shape[0], dropout, a, b, bias):
        return passes.forward(_HERE, x, w, bias, a, b, scale, dropout, seed)
    tokens, rank, columns = x.shape[0], a.shape[0], b.shape[0]
    h = torch.empty(tokens, rank, dtype=torch.float32, device="cpu")
    y = x @ w.t() if bias is None else torch.empty(tokens, columns, dtype=x.dtype, device="cpu")
    job = _Forward(
        *_about(x, dropout, seed),
        *_about(y),
        0 if bias is None else bias.data_ptr(),
        rank,
        *lies(a, 0),
        *lies(b, 1),
        h.data_ptr(),
        _room(max(tiles(rank, x.shape[1], 0, True), _tiles_of_u(rank, columns))),
    )
    _lib(x).forward(job, c_float(reference.scaled(scale, dropout)), c_int(threads()))
    # torch copies a bias before it adds the product: so that comes last, to what stands there then
    return y if bias is None else y.addmm_(x, w.t()), h


def backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor | None,
    h: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    for_x: bool,
    for_a: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """`passes.backward`, so too."""
    if w is None or not _is_whole(x, b.shape[0], dropout, a, b, dy):
        return passes.backward(_HERE, dy, x, w, h, a, b, scale, dropout, seed, for_x, for_a)
    (tokens, columns), rank, dx = x.shape, a.shape[0], dy @ w if for_x else None
    dh = torch.empty(tokens, rank, dtype=torch.float32, device="cpu")
    da, db = torch.empty_like(a) if for_a else None, torch.empty_like(b)
    chunk, pieces = _chunks(tokens)
    room = tiles(rank, dy.shape[1], pieces, True), tiles(rank, columns, pieces, False)
    job = _Backward(
        *_about(dy),
        *(_about(x, dropout, seed) if for_a else _NOTHING),
        *(_NOTHING if dx is None else _about(dx, dropout, seed)),
        rank,
        *lies(a, 0),
        *lies(b, 1),
        *lies(h, 1),
        *(_NOTHING[:3] if da is None else lies(da, 0)),
        *lies(db, 1),
        dh.data_ptr(),
        chunk,
        _room(max(*room, _tiles_of_u(rank, columns))),
    )
    _lib(dy).backward(job, c_float(reference.scaled(scale, dropout)), c_int(threads()))
    return dx, da, db


back = partial(passes.back, _HERE)


def knows(x: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether sides and rank are what a kernel has, for x (t, i), A (r, i) and B (o, r)."""
    return x.shape[1] % COLUMNS == b.shape[0] % COLUMNS == 0 and 0 < a.shape[0] <= RANK


def _is_whole(
    x: Tensor, columns: int, dropout: float, a: Tensor, b: Tensor, more: Tensor | None
) -> bool:
    """Whether all that a layer adds for x, and for a y of some columns, is one call's."""
    return (
        x.dtype is torch.bfloat16
        and columns % COLUMNS == 0
        and _fits(x, a.shape[0], dropout, a, b)
        and (more is None or (more.dtype is x.dtype and more.stride(-1) == 1 and is_memory(more)))
    )


def _fits(rows: Tensor, rank: int, dropout: float, *factors: Tensor) -> bool:
    """Whether rows, of columns by the 32, have a kernel, and factors are in fp32, of few ranks."""
    # a few rows in fp32 are in a cache, where BLAS is as fast and less is to be called
    few = rows.dtype is torch.float32 and not dropout and rows.numel() < _CACHED
    return (
        runs(rows.dtype)
        and not few
        and rows.shape[1] % COLUMNS == 0
        and rows.shape[0] * rows.shape[1] > 0
        and rows.stride(1) == 1
        and 0 < rank <= RANK
        and factors[0].dtype is factors[-1].dtype is torch.float32
        and is_memory(rows, *factors)
    )


def runs(dtype: torch.dtype) -> bool:
    """Whether x in a dtype has a kernel that can be called."""
    return dtype in KERNELS and kernel_of(dtype).ready()


def kernel_of(dtype: torch.dtype) -> Kernel:
    """The best kernel for x in a dtype that can be called, or the last one, which says why not."""
    best = KERNELS[dtype]
    return next((kernel for kernel in best if kernel.ready()), best[-1])


def _lib(x: Tensor) -> Any:
    return kernel_of(x.dtype).lib


def _reduce(
    lib: Any,
    x: Tensor,
    a: Tensor | None,
    d: Any,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Any, Any]:
    """s·drop(x) Aᵀ (t, r) where A (r, i) is given, and dᵀ drop(x) (r, i) where dᵀ (r, t) is."""
    (tokens, columns), rank, float32 = x.shape, (d if a is None else a).shape[0], torch.float32
    h = None if a is None else torch.empty(tokens, rank, dtype=float32, device="cpu")
    g = None
    if a is None:
        g = torch.empty(rank, columns, dtype=float32, device="cpu")
    elif d is not None:  # turned, as B is
        g = torch.empty(columns, rank, dtype=float32, device="cpu").t()
    chunk, pieces = (_BLOCK, 0) if d is None else _chunks(tokens)
    room = room_of(tiles(rank, columns, pieces, a is not None))
    lib.reduce(
        _rows(x, dropout, seed),
        c_long(rank),
        _factor(a),
        pointer(h),
        c_float(scale),
        _factor(d),
        _factor(g),
        c_long(chunk),
        room,
        c_int(threads()),
    )
    return h, g


def _expand(
    lib: Any, y: Tensor, h: Tensor, up: Tensor, dropout: float, seed: Tensor | None
) -> None:
    """y (t, o) += drop(h U), for hᵀ (r, t) and U (r, o)."""
    rank, room = up.shape[0], room_of(_tiles_of_u(*up.shape))
    factors = c_long(rank), _factor(h), _factor(up)
    lib.expand(_rows(y, dropout, seed), *factors, room, c_int(threads()))


def tiles(rank: int, columns: int, pieces: int, down: bool) -> int:
    """Those of A's parts, and of g's sums of some chunks of tokens."""
    return -(-rank // SIDE) * (columns // COLUMNS) * (2 * pieces + (_PARTS if down else 0))


def _tiles_of_u(rank: int, columns: int) -> int:
    return -(-rank // SIDE) * columns // SIDE


def _chunks(tokens: int) -> tuple[int, int]:
    """The tokens of a chunk, and how many there are: each has sums, so few for any threads."""
    chunk = max(4, -(-tokens // (16 * _BLOCK))) * _BLOCK
    return chunk, -(-tokens // chunk)


def room_of(tiles: int) -> c_void_p:
    return c_void_p(_room(tiles))


def _room(tiles: int) -> int:
    return address("tiles", tiles * _TILE)


def _factor(factor: Tensor | None) -> Any:
    if factor is None:
        return None
    return ctypes.byref(Factor(*lies(factor, 0)))


def _rows(x: Tensor, dropout: float, seed: Tensor | None) -> Any:
    return ctypes.byref(Rows(*_about(x, dropout, seed)))


def _about(x: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> tuple[int, ...]:
    """`struct Rows`, as numbers."""
    tokens, columns = x.shape
    if not dropout or seed is None:
        return x.data_ptr(), 0, tokens, columns, x.stride(0), 0, 0
    how = int(seed.item()), reference.threshold(dropout)
    return x.data_ptr(), 0, tokens, columns, x.stride(0), *how


def lies(factor: Tensor, ranks: int) -> tuple[int, int, int]:
    """`struct Factor`, as numbers, for a matrix whose ranks are its rows, 0, or columns, 1."""
    return factor.data_ptr(), factor.stride(ranks), factor.stride(1 - ranks)


def _agrees(dtype: torch.dtype, lib: Any) -> bool:
    """Whether each product of a few tokens is that of the reference in fp64, with its mask."""
    dropout, seed = 0.25, torch.tensor(2**61 + 2**31, device="cpu")
    x, a, d = (_waves(*shape) for shape in ((71, 96), (18, 96), (18, 71)))
    rows, mask = x.to(dtype), reference.keep(seed, len(x), x.shape[1], dropout)
    low = rows.double() * mask
    h, g = _reduce(lib, rows, a, d, 1.5, dropout, seed)
    y = rows.clone()
    _expand(lib, y, d, a, dropout, seed)
    true = rows.double() + d.t().double() @ a.double() * mask
    pairs = (h, 1.5 * low @ a.t().double()), (g, d.double() @ low), (y, true)
    bounds = 1e-6, 1e-6, 4e-3 if dtype is torch.bfloat16 else 1e-6
    return all(
        bool((found - true).norm() < bound * true.norm())
        for (found, true), bound in zip(pairs, bounds, strict=True)
    )


def _waves(n: int, m: int) -> Tensor:
    return torch.arange(n * m, dtype=torch.float32, device="cpu").sin().view(n, m)


KERNEL = Kernel(
    name="low_rank",
    needs=("amx_tile", "amx_bf16", "avx512f", "avx512bw", "avx512vl", "avx512_bf16"),
    flags=("-mamx-tile", "-mamx-bf16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16"),
    ran=("GenuineIntel",),
    does="fp32 factors are split into parts for AMX, where sides are multiples of 32",
    agrees=partial(_agrees, torch.bfloat16),
)

_VECTORS = ("avx512f", "avx512bw", "avx512vl")

HALF = Kernel(
    name="half",
    needs=_VECTORS,
    flags=tuple(f"-m{flag}" for flag in _VECTORS),
    ran=("AuthenticAMD",),
    does="rows in bf16 are widened in registers for AVX-512, where sides are multiples of 32",
    agrees=partial(_agrees, torch.bfloat16),
)

SINGLE = Kernel(
    name="single",
    needs=_VECTORS,
    flags=HALF.flags,
    ran=("GenuineIntel", "AuthenticAMD"),
    does="skinny products in fp32 by AVX-512, where sides are multiples of 32",
    agrees=partial(_agrees, torch.float32),
)

KERNELS = {torch.bfloat16: (KERNEL, HALF), torch.float32: (SINGLE,)}
"""By the dtype of x, the best one first."""

ROWS = {torch.bfloat16: HALF, torch.float32: SINGLE}
"""By the dtype of x, those that know a bank's rows."""
