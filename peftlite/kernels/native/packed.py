"""Packed weights by packed.c: formed at the speed of a copy, or multiplied as they are."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from ctypes import c_int, c_long, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftlite.kernels.native import low_rank
from peftlite.kernels.native.kernel import Kernel, is_plain, pointer, threads

KINDS = ("nf4", "int8", "fp8")
FEW = 16
"""Rows of x, up to which they are multiplied with the codes themselves."""
TILED = 4, 512
"""Rows of x in bf16, at least and at most, for which AMX does that."""
WIDEST = 1 << 16
"""Columns of W, whose scales for 16 rows lie on a thread's stack."""
BACK = 128
"""Rows of dy in bf16, up to which AMX does that for dy W."""

_DTYPES = (torch.bfloat16, torch.float32)


class Codes(NamedTuple):
    """W in codes.

    Attributes:
        kind: "nf4", "int8" or "fp8".
        block: weights that have one scale.
        parts: the codes, "", and the scales: `absmax` (n,), or its 8-bit codes with `nested_absmax`
            and `nested_offset`; or `scale` (n, 1).
        levels: the 16 of NF4.
        values: the 256 of 8-bit codes of scales.
    """

    kind: str
    block: int
    parts: Mapping[str, Tensor]
    levels: Tensor
    values: Tensor


class _Weights(ctypes.Structure):
    """`struct Weights`. Its tensors are held by whoever calls."""

    _fields_ = [
        ("kind", c_long),
        *((name, c_void_p) for name in ("codes", "levels")),
        *((name, c_void_p) for name in ("absmax", "coded", "values", "nested", "offset")),
        *((name, c_long) for name in ("numbers", "block")),
    ]


def unpack(codes: Codes, out: Tensor) -> bool:
    """Writes W, the same bits as plain torch does, into a contiguous tensor; False if it can't."""
    if not (out.dtype in _DTYPES and _known(codes) and is_plain(out) and KERNEL.ready()):
        return False
    _unpack(KERNEL.lib, codes, out)
    return True


def few(x: Tensor, codes: Codes, bias: Tensor | None) -> Tensor | None:
    """y (…, o) = x Wᵀ + bias of a few rows x (…, i), without forming W; None if it can't."""
    kernel = _kernel(x, codes)
    beside = [] if bias is None else [bias]
    alike = all(part.dtype is x.dtype for part in beside)
    if not (kernel and alike and _known(codes) and is_plain(x, *beside) and kernel.ready()):
        return None
    return _few(kernel.lib, x, codes, bias)


def back(dy: Tensor, codes: Codes, i: int) -> Tensor | None:
    """dx (…, i) = dy W of rows dy (…, o), without forming W; None if it can't."""
    o = dy.shape[-1]
    fits = i % 64 == i % codes.block == o % 32 == codes.block % 64 == 0
    if not (fits and dy.dtype is torch.bfloat16 and 0 < dy.numel() <= BACK * o):
        return None
    if not (_known(codes) and is_plain(dy) and TILES.ready()):
        return None
    return _back(TILES.lib, dy, codes, i)


def _kernel(x: Tensor, codes: Codes) -> Kernel | None:
    """That for the product with x (…, i), of its rows and sides."""
    i, block = x.shape[-1], codes.block
    if not x.numel() or i > WIDEST or (codes.kind == "nf4" and (i % block or block < 64)):
        return None
    rows, (least, most) = x.numel() // i, TILED
    if x.dtype is torch.bfloat16 and least <= rows <= most and i % 64 == 0 and TILES.ready():
        return TILES
    fits = i % (128 if codes.kind == "nf4" else 16) == 0
    return KERNEL if fits and rows <= FEW and x.dtype in _DTYPES else None


def _known(codes: Codes) -> bool:
    """Whether the parts are memory, of the dtypes that C takes them to be of."""
    parts = codes.parts
    scales = {
        k: parts[k] for k in ("scale", "absmax", "nested_absmax", "nested_offset") if k in parts
    }
    if "nested_absmax" in scales and scales.pop("absmax").dtype is not torch.uint8:
        return False
    single = all(part.dtype is torch.float32 for part in scales.values())
    return single and parts[""].element_size() == 1 and is_plain(*parts.values())


def _unpack(lib: Any, codes: Codes, out: Tensor) -> None:
    wide = c_long(out.dtype is torch.float32)
    lib.unpack(_weights(codes, out.numel()), wide, pointer(out), c_int(threads()))


def _few(lib: Any, x: Tensor, codes: Codes, bias: Tensor | None) -> Tensor | None:
    i, coded = x.shape[-1], codes.parts[""].numel()
    o = coded * (2 if codes.kind == "nf4" else 1) // i
    y = x.new_empty(*x.shape[:-1], o)
    sizes = (c_long(n) for n in (x.numel() // i, i, o, x.dtype is torch.float32))
    w = _weights(codes, o * i)
    failed = lib.few(w, pointer(x), pointer(bias), pointer(y), *sizes, c_int(threads()))
    return None if failed else y


def _back(lib: Any, dy: Tensor, codes: Codes, i: int) -> Tensor | None:
    o = dy.shape[-1]
    dx = dy.new_empty(*dy.shape[:-1], i)
    sizes = (c_long(n) for n in (dy.numel() // o, i, o))
    failed = lib.back(_weights(codes, o * i), pointer(dy), pointer(dx), *sizes, c_int(threads()))
    return None if failed else dx


def _weights(codes: Codes, numbers: int) -> Any:
    parts = codes.parts
    scales = parts["absmax" if codes.kind == "nf4" else "scale"]
    if "nested_absmax" in parts:
        each = (None, scales, codes.values, parts["nested_absmax"], parts["nested_offset"])
    else:
        each = (scales, *[None] * 4)
    pointers = map(pointer, (parts[""], codes.levels, *each))
    return ctypes.byref(_Weights(KINDS.index(codes.kind), *pointers, numbers, codes.block))


def _forms(lib: Any) -> bool:
    """Whether small weights of each kind are formed and multiplied as by plain torch."""
    out = [torch.empty_like(w, dtype=torch.bfloat16) for _, w in _samples()]
    for (codes, _), found in zip(_samples(), out, strict=True):
        _unpack(lib, codes, found)
    same = (torch.equal(found, w.bfloat16()) for (_, w), found in zip(_samples(), out, strict=True))
    return all(same) and _multiplies(lib, torch.float32, 1e-5)


def _multiplies(lib: Any, dtype: torch.dtype, bound: float) -> bool:
    """Whether rows are multiplied with small weights of each kind as by plain torch."""
    x = torch.linspace(-1, 2, 5 * 128, dtype=torch.float32, device="cpu").view(5, 128).to(dtype)
    for codes, w in _samples():
        y, true = _few(lib, x, codes, None), x.float() @ w.t()
        if y is None or (y - true).norm() > bound * true.norm():
            return False
    return True


def _samples() -> Iterator[tuple[Codes, Tensor]]:
    """Weights of each kind, with what they are in fp32."""
    float32: Any = {"dtype": torch.float32, "device": "cpu"}
    byte = torch.arange(256, device="cpu").to(torch.uint8)
    levels, values = (torch.linspace(-1, 1, n, **float32) for n in (16, 256))
    scale = torch.tensor([[0.7], [1.3]], **float32)
    nested = {"nested_absmax": scale[0], "nested_offset": scale[1, 0]}
    absmax = (values[100:104] * scale[0] + scale[1])[:, None]
    pairs = torch.stack([levels[byte.int() >> 4], levels[byte.int() & 15]], -1)
    parts = {"": byte, "absmax": byte[100:104], **nested}
    yield Codes("nf4", 128, parts, levels, values), pairs.view(4, 128) * absmax
    tiny = byte % 127
    wide = {"int8": byte.view(torch.int8), "fp8": tiny.view(torch.float8_e4m3fn)}
    for kind, q in (("int8", wide["int8"]), ("fp8", tiny)):
        w = wide[kind].float().view(2, 128) * scale
        yield Codes(kind, 128, {"": q, "scale": scale}, levels, values), w


KERNEL = Kernel(
    name="packed",
    needs=("avx512f", "avx512bw", "avx512vl", "fma"),
    flags=("-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma"),
    ran=("GenuineIntel", "AuthenticAMD"),
    does=f"codes are read 16 at a time; up to {FEW} rows are multiplied with them as they are",
    agrees=_forms,
)
TILES = Kernel(
    name="packed_tiles",
    needs=(*low_rank.KERNEL.needs, "fma"),
    flags=(*low_rank.KERNEL.flags, "-mfma"),
    ran=low_rank.KERNEL.ran,
    does=f"{TILED[0]} to {TILED[1]} rows are multiplied with weights that are formed in AMX tiles",
    agrees=lambda lib: _multiplies(lib, torch.bfloat16, 5e-3),
)
