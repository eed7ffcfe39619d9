"""The operations of the low-rank path in torch: the fast ones on a CPU, and on any device.

All take matrices. Factors, h and dh are in one dtype c: that of x and dY, or wider, into which
these are then converted. Conversions and masks are made some rows at a time, in room that is kept
for the next ones, so that nothing of the size of x is formed in the wider dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat

import torch
from torch import Tensor
from torch.compiler import is_compiling

from peftlite.kernels import passes
from peftlite.kernels.native import mask
from peftlite.kernels.reference import FIRST, HALF, SECOND, STEP, scaled, threshold
from peftlite.kernels.workspace import workspace

_ENTRIES = 2**19  # of x or y, that a thread converts and masks at once
_PIECE = 128  # columns, that a thread sums over the tokens at once
_ALONE = 2**14 - 1  # words, whose halves torch leaves to one thread
_CACHED = 2**16  # words, that stay in a core's cache
_FEW = 16  # rows of A, that are slow as columns of a result
_HERE = sys.modules[__name__]

forward = partial(passes.forward, _HERE)
backward = partial(passes.backward, _HERE)


def shrink(x: Tensor, a: Tensor, scale: float, dropout: float, seed: Tensor | None) -> Tensor:
    """h = s·drop(x) Aᵀ, (t, r) in c."""
    factor = scaled(scale, dropout)
    return _joined([_low(a, part, factor) for _, part in _parts(x, a.dtype, dropout, seed)])


def grad_ab(
    dy: Tensor, h: Tensor, b: Tensor, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """dh (t, r) = s·dY B and dB (o, r) = dYᵀ h in c, for an h that is scaled."""
    dh, db, factor = [], None, scaled(scale, dropout)
    for rows, part in _parts(dy, h.dtype, 0.0, None):
        dh.append(_low(b.t(), part, factor))
        db = _summed(db, _across(h[rows], part))
    assert db is not None
    return _joined(dh), db.t().to(h.dtype)


def grad_a(dh: Tensor, x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """dA = dhᵀ drop(x) in c, for a dh that is scaled."""
    da = None
    for rows, part in _parts(x, dh.dtype, dropout, seed):
        da = _summed(da, _across(dh[rows], part))
    assert da is not None
    return da.to(dh.dtype)


def back(
    dh: Tensor,
    x: Tensor | None,
    dx: Tensor | None,
    a: Tensor,
    dropout: float,
    seed: Tensor | None,
) -> Tensor | None:
    """`passes.back`, with one mask for dA and dx."""
    if x is None or dx is None or not dropout:
        return passes.back(_HERE, dh, x, dx, a, dropout, seed)
    da = None
    for rows, part, room, drop in _blocks(x, dh.dtype, dropout, seed):
        assert drop is not None
        da = _summed(da, _across(dh[rows], drop(room, part)))
        _put(dx[rows], drop(torch.mm(dh[rows], a, out=room), room))
    assert da is not None
    return da.to(dh.dtype)


def _put(y: Tensor, more: Tensor) -> None:
    """y += what may be wider, and is of no more use then."""
    if y.dtype is more.dtype:
        y.add_(more)
    else:
        y.copy_(more.add_(y))


def _summed(total: Tensor | None, part: Tensor) -> Tensor:
    """A sum with a part more, in fp32 at least."""
    if total is None:
        return part
    return total.to(torch.promote_types(part.dtype, torch.float32)).add_(part)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def add(y: Tensor, h: Tensor, up: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """y (t, o) += h U, or drop(h U) for an h (t, r) that is scaled, in place."""
    if h.dtype is y.dtype and not dropout:
        return y.addmm_(h, up)
    for rows, to, room, drop in _blocks(y, h.dtype, dropout, seed):
        if drop is None:
            to.copy_(room.copy_(to).addmm_(h[rows], up))
            continue
        _put(to, drop(torch.mm(h[rows], up, out=room), room))
    return y


def product(
    x: Tensor,
    w: Tensor,
    h: Tensor,
    up: Tensor,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    into: Callable[..., Tensor] = add,
) -> Tensor:
    """x W + h U + bias, or x W + drop(h U) for an h that is scaled; W is (i, o), and U (r, o).

    `into` is what adds, as `add` does.
    """
    # on top of the large product: oneDNN is slower at adding to what is there
    y = x @ w if bias is None else torch.addmm(bias, x, w)
    return into(y, h, up, dropout, seed)


def expand(
    h: Tensor,
    up: Tensor,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    dtype: torch.dtype,
    into: Callable[..., Tensor] = add,
) -> Tensor:
    """h U + bias (t, o), or drop(h U) for a scaled h (t, r), rounded to a dtype once."""
    y = h.new_zeros(len(h), up.shape[1], dtype=dtype)
    return into(y if bias is None else y.add_(bias), h, up, dropout, seed)


def _low(a: Tensor, x: Tensor, factor: float) -> Tensor:
    """factor·x Aᵀ, rounded once: by rows where threads can share them, or A xᵀ, turned."""
    if a.shape[0] < _FEW or a.dtype.itemsize < 4:
        return a.new_empty(a.shape[0], x.shape[0]).addmm_(a, x.t(), beta=0, alpha=factor).t()
    return a.new_empty(x.shape[0], a.shape[0]).addmm_(x, a.t(), beta=0, alpha=factor)


def _across(h: Tensor, x: Tensor) -> Tensor:
    """hᵀ x, a piece of the columns at a time: BLAS spreads its few rows badly over threads."""
    alone = not x.is_cpu or is_compiling() or torch.get_num_threads() == 1
    if alone or x.dtype.itemsize < 4 or x.shape[1] % _PIECE:
        return h.t() @ x
    split = x.unflatten(1, (-1, _PIECE)).transpose(0, 1)
    return torch.bmm(h.t().expand(len(split), -1, -1), split).transpose(0, 1).flatten(1)


def _parts(
    x: Tensor, dtype: torch.dtype, dropout: float, seed: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of x at a time, in c and with the mask's zeros, to be used before the next ones."""
    if x.dtype is dtype and not dropout:
        yield slice(None), x
        return
    for rows, part, room, drop in _blocks(x, dtype, dropout, seed):
        yield rows, room.copy_(part) if drop is None else drop(room, part)


def _blocks(
    x: Tensor, dtype: torch.dtype, dropout: float, seed: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor, Callable[[Tensor, Tensor], Tensor] | None]]:
    """Some rows of x at a time: which, they, room for them in a dtype, and what drops some into it.

    They are all of x where that is left to a compiler or a GPU, or x is a fake.
    """
    tokens, columns = x.shape
    if not _is_eager(x):
        every, room = [slice(None)], torch.empty_like(x, dtype=dtype)
    else:
        # a mask of torch's needs as much again, and what isn't converted is read but once
        entries = _ENTRIES // (1 if not dropout or mask.KERNEL.ready() else 2)
        entries *= 4 if x.dtype is dtype else 1
        entries *= min(torch.get_num_threads(), 4)
        step = max(1, min(tokens, entries // max(1, columns)))
        room = workspace("rows", (step, columns), dtype)
        every = [slice(i, i + step) for i in range(0, max(1, tokens), step)]
    drops = repeat(None) if not dropout or seed is None else _drops(x, room, every, dropout, seed)
    for rows, drop in zip(every, drops, strict=False):
        part = x[rows]
        yield rows, part, room[: part.shape[0]], drop


def _drops(
    x: Tensor, room: Tensor, every: list[slice], dropout: float, seed: Tensor
) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """For some rows of x at a time, what writes them to `to` but for those dropout doesn't keep."""
    if mask.drops(room):
        number = int(seed.item())

        def drop(to: Tensor, of: Tensor, first: int) -> Tensor:
            if of.dtype is not to.dtype or not mask.drops(of):
                of = to.copy_(of)
            return mask.drop(to, of, first, dropout, number)

        for rows in every:
            yield partial(drop, first=rows.start)
        return
    for ones in _masks(x, room, every, dropout, seed):

        def times(to: Tensor, of: Tensor, ones: Tensor = ones) -> Tensor:
            # of several dtypes, torch converts into memory of its own
            return torch.mul(of if of.dtype is to.dtype else to.copy_(of), ones, out=to)

        yield times


def _masks(
    x: Tensor, room: Tensor, every: list[slice], dropout: float, seed: Tensor
) -> Iterator[Tensor]:
    """For some rows of x at a time a 1 for what dropout keeps of them: as `reference.keep`."""
    tokens, columns = x.shape
    row = torch.arange(tokens, device=x.device)[:, None]
    pair = torch.arange((columns + 1) // 2, device=x.device)
    row = _mix((row * STEP ^ seed).to(torch.int32))
    pair = _mix((pair * STEP ^ seed >> 32).to(torch.int32))
    at_once = tokens
    if eager := _is_eager(x):
        # so few words at a time that one thread does them: else each operation waits for all
        words = _CACHED if torch.get_num_threads() == 1 else _ALONE
        at_once = max(1, words // max(1, len(pair)))
    for rows in every:
        own = row[rows]
        shape = len(own), columns
        ones = workspace("ones", shape, room.dtype) if eager else room.new_empty(shape)
        for some, to in zip(own.split(at_once), ones.split(at_once), strict=True):
            halves = _mix(some ^ pair).view(torch.int16)
            to.copy_(halves.ge_(threshold(dropout) - 2**15)[:, :columns])
        yield ones


def _is_eager(x: Tensor) -> bool:
    """Whether x is to be gone through some rows at a time, and not by a compiler or a GPU."""
    return type(x) is Tensor and x.is_cpu and not is_compiling()


def _mix(word: Tensor) -> Tensor:
    """The hash of every entry, in place: an int32 shifts its sign in, and `&` takes it out."""
    word.mul_(FIRST - 2**32)
    shifted = word >> 13
    word.bitwise_xor_(shifted.bitwise_and_(2**19 - 1)).mul_(SECOND - 2**32)
    torch.bitwise_right_shift(word, 16, out=shifted)
    return word.bitwise_xor_(shifted.bitwise_and_(HALF))
