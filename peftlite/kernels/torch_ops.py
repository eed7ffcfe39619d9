"""The operations of the low-rank path in torch: the fast ones on a CPU, and on any device.

All take matrices. Factors, h and dh are in one dtype c: that of x and dY, or wider, into which
these are then converted. Conversions and masks are made a few rows at a time and used while they
are in the cache, so that nothing of the size of x is formed in the wider dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.compiler import is_compiling

from peftlite.kernels.reference import FIRST, HALF, SECOND, STEP, kept, threshold

_ENTRIES = 2**18  # of x or y, that a thread converts and masks at once


def shrink(x: Tensor, a: Tensor, scale: float, dropout: float, seed: Tensor | None) -> Tensor:
    """h = s·drop(x) Aᵀ, (t, r) in c."""
    factor = _factor(scale, dropout)
    return _joined([_low(a, part, factor) for _, part in _parts(x, a.dtype, dropout, seed)])


def grad_ab(
    dy: Tensor, h: Tensor, b: Tensor, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """dh = s·dY B and dB = dYᵀ h in c, for an h that is scaled."""
    dh, db, factor = [], None, _factor(scale, dropout)
    for rows, part in _parts(dy, h.dtype, 0.0, None):
        dh.append(_low(b.t(), part, factor))
        db = _summed(db, h[rows].t() @ part)
    return _joined(dh), db.t().to(h.dtype)


def grad_a(dh: Tensor, x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """dA = dhᵀ drop(x) in c, for a dh that is scaled."""
    da = None
    for rows, part in _parts(x, dh.dtype, dropout, seed):
        da = _summed(da, dh[rows].t() @ part)
    return da.to(dh.dtype)


def _summed(total: Tensor | None, part: Tensor) -> Tensor:
    """A sum with a part more, in fp32 at least."""
    if total is None:
        return part
    return total.to(torch.promote_types(part.dtype, torch.float32)).add_(part)


def _joined(parts: list[Tensor]) -> Tensor:
    """(t, r) of parts (r, some of t)."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).t()


def product(
    x: Tensor,
    w: Tensor,
    h: Tensor,
    up: Tensor,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """x W + h U + bias, or x W + drop(h U) for an h that is scaled; W is (i, o), and U (r, o)."""
    # on top of the large product: oneDNN is slower at adding to what is there
    y = x @ w if bias is None else torch.addmm(bias, x, w)
    return add(y, h, up, dropout, seed)


def add(y: Tensor, h: Tensor, up: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """y += h U, or drop(h U) for an h that is scaled, in place."""
    if h.dtype is y.dtype and not dropout:
        return y.addmm_(h, up)
    buffer = _buffer(y, h.dtype)
    for rows, mask in _masks(y, dropout, seed):
        to = y[rows]
        part = buffer[: len(to)]
        if mask is None:
            part.copy_(to).addmm_(h[rows], up)
        else:
            torch.mm(h[rows], up, out=part).mul_(mask).add_(to)
        to.copy_(part)
    return y


def expand(
    h: Tensor,
    up: Tensor,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """h U + bias, or drop(h U) for an h that is scaled, rounded to a dtype once."""
    y = h.new_zeros(len(h), up.shape[1], dtype=dtype)
    return add(y if bias is None else y.add_(bias), h, up, dropout, seed)


def _factor(scale: float, dropout: float) -> float:
    return scale * kept(dropout) if dropout else scale


def _low(a: Tensor, x: Tensor, factor: float) -> Tensor:
    """factor·A xᵀ, rounded once. Not x Aᵀ: few rows are up to twice as fast as few columns."""
    return a.new_empty(len(a), len(x)).addmm_(a, x.t(), beta=0, alpha=factor)


def _parts(
    x: Tensor, dtype: torch.dtype, dropout: float, seed: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of x at a time, in c and with the mask's zeros, to be used before the next ones."""
    if x.dtype is dtype and not dropout:
        yield slice(None), x
        return
    buffer = _buffer(x, dtype)
    for rows, mask in _masks(x, dropout, seed):
        part = x[rows]
        part = buffer[: len(part)].copy_(part)
        yield rows, part if mask is None else part.mul_(mask)


def _rows(x: Tensor) -> list[slice]:
    """The rows of x, some at a time; all at once where that is left to a compiler or a GPU."""
    if not x.is_cpu or is_compiling():
        return [slice(None)]
    entries = _ENTRIES * min(torch.get_num_threads(), 4)
    step = max(1, entries // max(1, x.shape[1]))
    return [slice(i, i + step) for i in range(0, max(1, len(x)), step)]


def _buffer(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x[_rows(x)[0]], dtype=dtype)


def _masks(x: Tensor, dropout: float, seed: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
    """Some rows of x at a time, and a 1 for what dropout keeps of them: as `reference.keep`."""
    tokens, columns = x.shape
    if not dropout or seed is None:
        yield from ((rows, None) for rows in _rows(x))
        return
    row = torch.arange(tokens, device=x.device)[:, None]
    pair = torch.arange((columns + 1) // 2, device=x.device)
    row = _mix((row * STEP ^ seed).to(torch.int32))
    pair = _mix((pair * STEP ^ seed >> 32).to(torch.int32))
    for rows in _rows(x):
        word = torch.bitwise_xor(row[rows], pair, out=row.new_empty(len(row[rows]), len(pair)))
        halves = _mix(word).view(torch.int16)[:, :columns]
        yield rows, halves.ge_(threshold(dropout) - 2**15)


def _mix(word: Tensor) -> Tensor:
    """The hash of every entry, in place: an int32 shifts its sign in, and `&` takes it out."""
    word.mul_(FIRST - 2**32)
    shifted = word >> 13
    word.bitwise_xor_(shifted.bitwise_and_(2**19 - 1)).mul_(SECOND - 2**32)
    torch.bitwise_right_shift(word, 16, out=shifted)
    return word.bitwise_xor_(shifted.bitwise_and_(HALF))
