"""NF4: four bits a weight, in blocks of one scale, byte for byte as bitsandbytes has them.

    W = s · c[q],  s = max |W| of its block,  q the nearest of 16 levels c

The levels are those of Dettmers et al., QLoRA (arXiv:2305.14314), appendix E. Of the two codes in
a byte the first is the high one. Double quantisation keeps the scales, less their mean, as 8-bit
codes of the dynamic map of Dettmers et al. (arXiv:2110.02861), in blocks of 256.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlite.kernels import dispatch
from peftlite.kernels.workspace import workspace

Device: TypeAlias = "torch.device | str"

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
_CHUNK = 1 << 17  # weights that are coded at a time: what they make fits a cache
_PIECE = 1 << 16  # bytes of codes that are read at a time: so does that
_HALF = 1 << 15  # half the bins of the table that codes are found by


@functools.cache
def levels(device: Device = "cpu") -> Tensor:
    """The 16 levels (16,), ascending, in fp32."""
    return torch.tensor(_LEVELS, device=device)


@functools.cache
def dynamic_map(device: Device = "cpu") -> Tensor:
    """The 256 values (256,), ascending, in fp32: 7 decades, twice the steps in each."""
    values = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1)
        means = (bounds[:-1] + bounds[1:]) / 2.0
        values += [sign * x for x in ((10.0 ** (i - 6)) * means).tolist() for sign in (1, -1)]
    return torch.tensor(sorted(values), device=device)


def pack(w: Tensor, block: int, double: bool, search: bool = False) -> dict[str, Tensor]:
    """The codes "" (⌈n/2⌉, 1) of a tensor of n numbers, and its parts by name.

    Without double quantisation there is one more part, `absmax` (⌈n/block⌉,) in fp32; with it,
    that holds 8-bit codes, and `nested_absmax` and `nested_offset` are there, too.
    """
    flat = w.detach().reshape(-1)
    whole = len(flat) // block * block
    codes = torch.empty(-(-len(flat) // 2), dtype=torch.uint8, device=w.device)
    scales, left = [], codes
    for piece in (*flat[:whole].split(_CHUNK), flat[whole:]):
        if not len(piece):
            continue
        shape = -1, min(block, len(piece))  # the last may be a shorter one
        blocks = workspace("blocks", piece.shape, torch.float32, w.device).copy_(piece).view(shape)
        scale = torch.abs(blocks, out=workspace("y", blocks.shape, torch.float32, w.device)).amax(1)
        if search:
            scale = _least_error(blocks, scale)
        q = nearest(blocks, scale).view(-1)
        if len(q) % 2:
            q = F.pad(q, (0, 1), value=_ZERO)
        torch.bitwise_or(q[::2] << 4, q[1::2], out=left[: len(q) // 2])
        left = left[len(q) // 2 :]
        scales.append(scale)
    absmax = torch.cat(scales)
    return {"": codes[:, None]} | (_nested(absmax) if double else {"absmax": absmax})


def nearest(blocks: Tensor, scale: Tensor) -> Tensor:
    """The codes (n, block) in uint8, until the next ones, of numbers in blocks with scales (n,).

    They're found by a table of bins, but where the bound of two codes is in a bin.
    """
    size, device = blocks.shape, blocks.device
    y, bin = (workspace(what, size, torch.float32, device) for what in ("y", "bin"))
    torch.mul(blocks, (1 / scale.clamp(min=1e-38))[:, None], out=y).clamp_(-1, 1)
    if y.numel() % 8:
        return _code(y)
    step = workspace("step", size, torch.int32, device)
    step.copy_(torch.add(_HALF, y, alpha=_HALF, out=bin))
    q = workspace("q", (y.numel(),), torch.uint8, device)
    torch.index_select(_bins(device), 0, step.view(-1), out=q)
    unsure = (q.view(torch.int64) & 0x1010101010101010).nonzero().view(-1)  # by eights
    q.view(-1, 8)[unsure] = _code(y.view(-1, 8)[unsure])
    return q.view(size)


def _code(y: Tensor) -> Tensor:
    c = levels(y.device).to(y.dtype)
    return torch.bucketize(y, (c[1:] + c[:-1]) / 2).to(torch.uint8)


@functools.cache
def _bins(device: Device) -> Tensor:
    """The codes (65537,) of what is in a bin, or 16: its bound may be off by a 30th of one."""
    start = torch.arange(-_HALF, _HALF + 1, dtype=torch.float64)
    first, last = (_code((start + end) / _HALF) for end in (-1 / 30, 31 / 30))
    return torch.where(first == last, first, 16).to(device)


def _least_error(blocks: Tensor, absmax: Tensor) -> Tensor:
    """Of ten scales from 0.75 to 1.1 of max |W|, that with the least Σ (W − Ŵ)² of each block."""
    c, best, found = levels(blocks.device), torch.full_like(absmax, torch.inf), absmax
    for share in torch.linspace(0.75, 1.1, 10).tolist():
        scale = absmax * share
        made = c[nearest(blocks, scale).int()] * scale[:, None]
        error = (blocks - made).square().sum(1)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, scale, found)
    return found


def _nested(absmax: Tensor) -> dict[str, Tensor]:
    """8-bit codes (n,) of scales (n,) less their mean, the scales of those, and the mean."""
    offset = absmax.mean().clamp_(max=torch.finfo(absmax.dtype).max)
    rows = F.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    scale = rows.abs().amax(1)
    y = torch.where(scale == 0, -1.0, rows.T / scale).T
    # bitsandbytes goes by a table of 65,536 steps, and not by the nearest value itself
    index = ((y + 1) * 32767.5 + 0.5).floor().long()
    codes = _steps(absmax.device)[index].view(-1)[: len(absmax)].clone()  # safetensors: no views
    return {"absmax": codes, "nested_absmax": scale, "nested_offset": offset}


@functools.cache
def _steps(device: Device) -> Tensor:
    values = dynamic_map()
    steps = torch.arange(65536, dtype=torch.float64) / 32767.5 - 1
    return torch.bucketize(steps, ((values[1:] + values[:-1]) / 2).double()).to(device, torch.uint8)


def scales(parts: Mapping[str, Tensor]) -> Tensor:
    """max |W| of each block (n,), in fp32."""
    absmax = parts["absmax"]
    if "nested_absmax" not in parts:
        return absmax
    nested = parts["nested_absmax"][:, None].expand(-1, NESTED_BLOCK).reshape(-1)[: len(absmax)]
    return _unnested(absmax, nested, parts["nested_offset"])


def _unnested(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    made = dynamic_map(codes.device).index_select(0, codes.int())
    return made.mul_(scale).add_(offset)


def rows(parts: Mapping[str, Tensor], at: Tensor, n: int, block: int) -> dict[str, Tensor]:
    """The parts of some rows (k,) of n numbers each, which are blocks, with scales in fp32."""
    codes = parts[""].view(-1, n // 2).index_select(0, at).view(-1, 1)
    per = n // block
    blocks = (at[:, None] * per + torch.arange(per, device=at.device)).view(-1)
    own = {"absmax": parts["absmax"].index_select(0, blocks)}
    if "nested_absmax" in parts:
        nested = parts["nested_absmax"].index_select(0, blocks // NESTED_BLOCK)
        own["absmax"] = _unnested(own["absmax"], nested, parts["nested_offset"])
    return {"": codes, **own}


def unpack(parts: Mapping[str, Tensor], block: int, out: Tensor) -> Tensor:
    """Writes W, rounded once from fp32, into a contiguous tensor of n numbers."""
    if (on_gpu := dispatch.packed_ops(out)) is not None:
        on_gpu.unpack(parts, levels(out.device), dynamic_map(out.device), block, out)
        return out
    codes, absmax, n = parts[""].view(-1), scales(parts), out.numel()
    flat, pairs = out.view(-1), _pairs(codes.device)
    whole = n // block * block
    rows = min(max(1, 2 * _PIECE // block) if out.is_cpu else n, whole // block)
    byte = workspace("byte", (rows * block // 2,), torch.int32, out.device)
    two = workspace("two", (rows * block // 2,), torch.int64, out.device)
    made = two.view(torch.float32).view(-1, block)
    # all is cut beforehand: what a call costs in Python counts here
    bytes = codes[: whole // 2].split(rows * block // 2)
    scale = absmax[: whole // block, None].split(rows)
    for q, s, w in zip(bytes, scale, flat[:whole].view(-1, block).split(rows), strict=True):
        if len(w) < rows:
            byte, two, made = byte[: len(q)], two[: len(q)], made[: len(w)]
        torch.index_select(pairs, 0, byte.copy_(q), out=two)
        w.copy_(made.mul_(s))
    if rest := n - whole:
        last = pairs.index_select(0, codes[whole // 2 :].int()).view(torch.float32)[:rest]
        flat[whole:] = last * absmax[-1]
    return out


def product(x: Tensor, parts: Mapping[str, Tensor], block: int, bias: Tensor | None) -> Any:
    """y (…, o) = x Wᵀ + bias of a few rows x (…, i) without forming W (o, i); None if it can't."""
    on_gpu = dispatch.packed_ops(x)
    if on_gpu is None or not dispatch.is_plain_weight(parts[""]):
        return None
    return on_gpu.product(x, parts, levels(x.device), dynamic_map(x.device), block, bias)


@functools.cache
def _pairs(device: Device) -> Tensor:
    """The two numbers in fp32 of a byte (256,), seen as one of int64."""
    byte, c = torch.arange(256), levels()
    pairs = torch.stack([c[byte >> 4], c[byte & 15]], 1)
    return pairs.view(torch.int64).view(-1).to(device)
