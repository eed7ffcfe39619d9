"""Layouts: weights as other libraries pack them, and the numbers that they stand for.

    W (o, i) = s (q − z),  a scale s and, but for floats, a zero z for g numbers of a row

    scaled      "" (o, i) int8 or float8; scale (1), (o, 1), (o, i/g), or of square blocks
    packed-b    "" (o, i·b/32); scale (o, i/g); zero (o·b/32, i/g); order (i)     compressed-tensors
    gptq-b      "" (i·b/32, o); scale (i/g, o); zero (i/g, o·b/32); order (i); z is 1 more than told
    gptq_v2-b   the same, z as it is told
    awq-b       "" (i, o·b/32); scale (i/g, o); zero (i/g, o·b/32); outputs by eights, reordered
    awq_gemv-b  "" (o, i·b/32); scale (o, i/g); zero (o, i/g·b/32), and more than those
    scb         "" (o, i) int8; scale (o), the largest of a row, 127 times s         bitsandbytes
    e2m1        "" (o, i/2) uint8; scale (o, i/g) float8, or uint8, an exponent; global (1)
    fp4         "" (⌈n/2⌉, 1) uint8; absmax and the rest as nf4 has them              bitsandbytes

Codes of b bits follow one another in int32 without a gap, the lowest first. `order` tells of each
input which scale it has. The parts are as their files have them, under names of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peftlite.quant import nf4

_PIECE = 1 << 18  # numbers that are formed at a time
_AWQ = [0, 4, 1, 5, 2, 6, 3, 7]
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Grouped:
    """A weight (o, i) with scales, its codes made a few rows at a time.

    Attributes:
        codes: what gives (r, i) of some rows.
        scale, zero: (o, n).
        order: of each input which of the n (i,); None where each has as many in turn.
    """

    codes: Callable[[slice], Tensor]
    scale: Tensor
    zero: Tensor | None = None
    order: Tensor | None = None

    def write(self, out: Tensor) -> Tensor:
        o, i = out.shape
        n = self.scale.shape[1]
        order = self.order
        if order is None and i % n:
            order = torch.arange(i, device=out.device) // -(-i // n)
        step = max(8, _PIECE // i // 8 * 8)
        for start in range(0, o, step):
            rows = slice(start, min(start + step, o))
            q, s = self.codes(rows).float(), self.scale[rows].float()
            z = None if self.zero is None else self.zero[rows].float()
            if order is None:
                q, s, z = q.view(len(q), n, -1), s[..., None], None if z is None else z[..., None]
            else:
                s, z = s[:, order], None if z is None else z[:, order]
            out[rows] = ((q if z is None else q - z) * s).view(-1, i)
        return out


def bits(words: Tensor, b: int, count: int) -> Tensor:
    """The numbers (…, count) of b bits that follow one another in int32 (…, w)."""
    if 8 % b == 0:
        bytes_ = words.contiguous().view(torch.uint8)
        parts = [(bytes_ >> shift) & (2**b - 1) for shift in range(0, 8, b)]
        return torch.stack(parts, -1).flatten(-2)[..., :count]
    long = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    starts = torch.arange(count, device=words.device) * b
    pairs = long[..., starts // 32] | (long[..., starts // 32 + 1] << 32)
    return ((pairs >> starts % 32) & (2**b - 1)).to(torch.uint8)


def _packed(parts: Parts, o: int, i: int, b: int) -> Grouped:
    half = 2 ** (b - 1)
    zero = parts.get("zero")
    if zero is not None:
        zero = bits(zero.t(), b, o).t()
    else:
        zero = torch.full_like(parts["scale"], half)
    return Grouped(lambda rows: bits(parts[""][rows], b, i), parts["scale"], zero, _order(parts))


def _order(parts: Parts) -> Tensor | None:
    return parts["order"].long() if "order" in parts else None


def _gptq(parts: Parts, o: int, i: int, b: int, more: int = 1) -> Grouped:
    zero = bits(parts["zero"], b, o).t().float() + more
    return Grouped(
        lambda rows: bits(parts[""][:, rows].t(), b, i), parts["scale"].t(), zero, _order(parts)
    )


def _gptq_v2(parts: Parts, o: int, i: int, b: int) -> Grouped:
    return _gptq(parts, o, i, b, more=0)


def _awq(parts: Parts, o: int, i: int, b: int) -> Grouped:
    def ordered(words: Tensor) -> Tensor:
        return bits(words, b, words.shape[-1] * 8).unflatten(-1, (-1, 8))[..., _AWQ].flatten(-2)

    def codes(rows: slice) -> Tensor:
        return ordered(parts[""][:, rows.start // 8 : -(-rows.stop // 8)]).t()

    return Grouped(codes, parts["scale"].t(), ordered(parts["zero"]).t())


def _awq_gemv(parts: Parts, o: int, i: int, b: int) -> Grouped:
    zero = bits(parts["zero"], b, parts["scale"].shape[1])
    return Grouped(lambda rows: bits(parts[""][rows], b, i), parts["scale"], zero)


def _scaled(parts: Parts, o: int, i: int, _: int) -> Grouped:
    scale, order = parts["scale"], None
    scale = scale.view(1, 1) if scale.numel() == 1 else scale
    if len(scale) != o:
        scale = scale.repeat_interleave(_side(o, len(scale)), 0)[:o]
        if scale.shape[1] > 1:
            order = torch.arange(i, device=scale.device) // _side(i, scale.shape[1])
    zero = parts.get("zero")
    zero = None if zero is None else zero.view(-1, scale.shape[1]).expand(scale.shape)
    return Grouped(lambda rows: parts[""][rows], scale, zero, order)


def _scb(parts: Parts, o: int, i: int, _: int) -> Grouped:
    return Grouped(lambda rows: parts[""][rows], parts["scale"].view(o, 1) / 127)


def _side(count: int, n: int) -> int:
    """Of n square blocks along a side, the last of which may be a narrower one."""
    return count if n == 1 else 1 << (-(-count // n) - 1).bit_length()


def _e2m1(parts: Parts, o: int, i: int, _: int) -> Grouped:
    scale = parts["scale"]
    scale = torch.exp2(scale.float() - 127) if scale.dtype is torch.uint8 else scale.float()
    if "global" in parts:
        scale = scale / parts["global"]
    levels = torch.tensor([*_E2M1, *(-x for x in _E2M1)], device=scale.device)

    def codes(rows: slice) -> Tensor:
        q = parts[""][rows]
        return levels[torch.stack([q & 15, q >> 4], -1).flatten(1).int()]

    return Grouped(codes, scale)


GROUPED: dict[str, Callable[[Parts, int, int, int], Grouped]] = {
    "scaled": _scaled, "packed": _packed, "gptq": _gptq, "gptq_v2": _gptq_v2, "awq": _awq,
    "awq_gemv": _awq_gemv, "scb": _scb, "e2m1": _e2m1,
}  # fmt: skip


def unpack(kind: str, parts: Parts, block: int, out: Tensor) -> Tensor:
    """Writes W, rounded once from fp32, into a contiguous tensor."""
    if kind == "fp4":
        return _fp4(parts, block, out)
    name, _, b = kind.partition("-")
    o, i = out.shape
    return GROUPED[name](parts, o, i, int(b or 0)).write(out)


def _fp4(parts: Parts, block: int, out: Tensor) -> Tensor:
    q, n = parts[""].view(-1), out.numel()
    flat = fp4_levels().to(q.device)[torch.stack([q >> 4, q & 15], -1).view(-1)[:n].int()]
    scale = nf4.scales(parts).repeat_interleave(block)[:n]
    return out.copy_((flat * scale).view(out.shape))


def fp4_levels() -> Tensor:
    """The 16 levels (16,) of bitsandbytes' fp4, by code, in fp32."""
    return torch.tensor([*_FP4, *(-x for x in _FP4)])
