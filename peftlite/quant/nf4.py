"""NF4: four bits a weight, in blocks of one scale, byte for byte as bitsandbytes has them.

    W = s · c[q],  s = max |W| of its block,  q the nearest of 16 levels c

The levels are those of Dettmers et al., QLoRA (arXiv:2305.14314), appendix E. Of the two codes in
a byte the first is the high one. Double quantisation keeps the scales, less their mean, as 8-bit
codes of the dynamic map of Dettmers et al. (arXiv:2110.02861), in blocks of 256.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, NESTED_BLOCK = 64, 256
SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Of a block, as bitsandbytes takes them."""

_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_ZERO = 7  # its code
_CHUNK = 1 << 20  # weights that are coded at a time
_PIECE = 1 << 15  # bytes of codes that are read at a time: what they make fits a cache


@functools.cache
def levels() -> Tensor:
    """The 16 levels (16,), ascending, in fp32."""
    return torch.tensor(_LEVELS)


@functools.cache
def dynamic_map() -> Tensor:
    """The 256 values (256,), ascending, in fp32: 7 decades, twice the steps in each."""
    values = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1)
        means = (bounds[:-1] + bounds[1:]) / 2.0
        values += [sign * x for x in ((10.0 ** (i - 6)) * means).tolist() for sign in (1, -1)]
    return torch.tensor(sorted(values))


def pack(w: Tensor, block: int, double: bool, search: bool = False) -> dict[str, Tensor]:
    """The codes "" (⌈n/2⌉, 1) of a tensor of n numbers, and its parts by name.

    Without double quantisation there is one more part, `absmax` (⌈n/block⌉,) in fp32; with it,
    that holds 8-bit codes, and `nested_absmax` and `nested_offset` are there, too.
    """
    flat = w.detach().reshape(-1)
    whole = len(flat) // block * block
    codes, scales = [], []
    for piece in (*flat[:whole].split(_CHUNK), flat[whole:]):
        if not len(piece):
            continue
        blocks = piece.float().view(-1, min(block, len(piece)))  # the last may be a shorter one
        scale = blocks.abs().amax(1)
        if search:
            scale = _least_error(blocks, scale)
        codes.append(nearest(blocks, scale).view(-1))
        scales.append(scale)
    q, absmax = torch.cat(codes), torch.cat(scales)
    q = F.pad(q, (0, len(q) % 2), value=_ZERO).view(-1, 2)
    parts = {"": (q[:, :1] << 4) | q[:, 1:]}
    return parts | (_nested(absmax) if double else {"absmax": absmax})


def nearest(blocks: Tensor, scale: Tensor) -> Tensor:
    """The codes (n, block) in uint8 of numbers in blocks with scales (n,)."""
    c = levels().to(blocks.device)
    y = blocks * (1 / scale.clamp(min=1e-38))[:, None]
    return torch.bucketize(y, (c[1:] + c[:-1]) / 2, out_int32=True).to(torch.uint8)


def _least_error(blocks: Tensor, absmax: Tensor) -> Tensor:
    """Of ten scales from 0.75 to 1.1 of max |W|, that with the least Σ (W − Ŵ)² of each block."""
    c, best, found = levels().to(blocks.device), torch.full_like(absmax, torch.inf), absmax
    for share in torch.linspace(0.75, 1.1, 10).tolist():
        scale = absmax * share
        made = c[nearest(blocks, scale).int()] * scale[:, None]
        error = (blocks - made).square().sum(1)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, scale, found)
    return found


def _nested(absmax: Tensor) -> dict[str, Tensor]:
    """8-bit codes (n,) of scales (n,) less their mean, the scales of those, and the mean."""
    offset = absmax.mean()
    rows = F.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    scale = rows.abs().amax(1)
    y = torch.where(scale == 0, -1.0, rows.T / scale).T
    # bitsandbytes goes by a table of 65,536 steps, and not by the nearest value itself
    index = ((y + 1) * 32767.5 + 0.5).floor().long()
    codes = _steps().to(absmax.device)[index].view(-1)[: len(absmax)]
    return {"absmax": codes, "nested_absmax": scale, "nested_offset": offset}


@functools.cache
def _steps() -> Tensor:
    values = dynamic_map()
    steps = torch.arange(65536, dtype=torch.float64) / 32767.5 - 1
    return torch.bucketize(steps, ((values[1:] + values[:-1]) / 2).double()).to(torch.uint8)


def scales(parts: Mapping[str, Tensor]) -> Tensor:
    """max |W| of each block (n,), in fp32."""
    absmax = parts["absmax"]
    if "nested_absmax" not in parts:
        return absmax
    nested = parts["nested_absmax"].repeat_interleave(NESTED_BLOCK)[: len(absmax)]
    return dynamic_map().to(absmax.device)[absmax.int()] * nested + parts["nested_offset"]


def unpack(parts: Mapping[str, Tensor], block: int, out: Tensor) -> Tensor:
    """Writes W, rounded once from fp32, into a contiguous tensor of n numbers."""
    codes, absmax, n = parts[""].view(-1), scales(parts), out.numel()
    flat = out.view(-1)
    table = _pairs().to(codes.device)
    whole = n // block * block
    step = max(_PIECE, block // 2)
    for start in range(0, whole // 2, step):
        piece = codes[start : min(start + step, whole // 2)]
        made = table[piece.int()].view(torch.float32).view(-1, block)
        first = 2 * start // block
        into = flat[2 * start : 2 * (start + len(piece))].view(-1, block)
        torch.mul(made, absmax[first : first + len(made), None], out=into)
    if rest := n - whole:
        made = table[codes[whole // 2 :].int()].view(torch.float32)[:rest]
        flat[whole:] = (made * absmax[-1]).to(out.dtype)
    return out


@functools.cache
def _pairs() -> Tensor:
    """The two numbers in fp32 of a byte (256,), seen as one of int64."""
    byte, c = torch.arange(256), levels()
    return torch.stack([c[byte >> 4], c[byte & 15]], 1).view(torch.int64).view(-1)
