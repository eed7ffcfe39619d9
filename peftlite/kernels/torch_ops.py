"""The operations of the low-rank path in torch: the fast ones on a CPU, and on any device.

All take matrices. A mask is made a few rows at a time, while these are in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftlite.kernels.reference import FIRST, HALF, SECOND, STEP, kept, threshold

_ROWS_OF = 2**17  # entries of x whose mask is made at once


def shrink(x: Tensor, a: Tensor, scale: float, dropout: float, seed: Tensor | None) -> Tensor:
    """h = s·drop(x) Aᵀ, (t, r)."""
    if dropout:
        x = _dropped(x, dropout, seed)
    return _scaled(_times_transposed(x, a), scale, dropout)


def grad_ab(
    dy: Tensor, h: Tensor, b: Tensor, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """dh = s·dY B, and dB = dYᵀ h for an h that is scaled."""
    return _scaled(_times_transposed(dy, b.t()), scale, dropout), (h.t() @ dy).t()


def grad_a(dh: Tensor, x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """dA = dhᵀ drop(x), for a dh that is scaled."""
    return dh.t() @ (_dropped(x, dropout, seed) if dropout else x)


def expand(
    h: Tensor, up: Tensor, bias: Tensor | None, dropout: float, seed: Tensor | None
) -> Tensor:
    """h U + bias, or drop(h U) for an h that is scaled."""
    y = h @ up if bias is None else torch.addmm(bias, h, up)
    if dropout:
        for rows, mask in _masks(y, dropout, seed):
            rows.mul_(mask)
    return y


def _scaled(h: Tensor, scale: float, dropout: float) -> Tensor:
    scale *= kept(dropout) if dropout else 1
    return h if scale == 1 else h.mul_(scale)


def _times_transposed(x: Tensor, a: Tensor) -> Tensor:
    """x Aᵀ; in half precision on a CPU oneDNN is twice as fast at A xᵀ."""
    return (a @ x.t()).t() if x.dtype is torch.bfloat16 and x.is_cpu else x @ a.t()


def _dropped(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """x with the mask's zeros, the rest as it was."""
    out = torch.empty_like(x)
    for (rows, mask), to in zip(_masks(x, dropout, seed), out.split(_rows(x)), strict=True):
        torch.mul(rows, mask, out=to)
    return out


def _rows(x: Tensor) -> int:
    return max(1, _ROWS_OF // x.shape[1]) if x.is_cpu else max(1, len(x))


def _masks(x: Tensor, dropout: float, seed: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of x, some at a time, and a 1 for what of them is kept: as `reference.keep`."""
    row = torch.arange(len(x), device=x.device)[:, None]
    pair = torch.arange((x.shape[1] + 1) // 2, device=x.device)
    row = _mix((row * STEP ^ seed).to(torch.int32))
    pair = _mix((pair * STEP ^ seed >> 32).to(torch.int32))
    for rows, own in zip(x.split(_rows(x)), row.split(_rows(x)), strict=True):
        word = torch.bitwise_xor(own, pair, out=own.new_empty(len(own), len(pair)))
        halves = _mix(word).view(torch.int16)[:, : x.shape[1]]
        yield rows, halves.ge_(threshold(dropout) - 2**15)


def _mix(word: Tensor) -> Tensor:
    """The hash of every entry, in place: an int32 shifts its sign in, and `&` takes it out."""
    word.mul_(FIRST - 2**32)
    shifted = word >> 13
    word.bitwise_xor_(shifted.bitwise_and_(2**19 - 1)).mul_(SECOND - 2**32)
    torch.bitwise_right_shift(word, 16, out=shifted)
    return word.bitwise_xor_(shifted.bitwise_and_(HALF))
