"""quantize and dequantize: the large weights of a frozen base in four or eight bits, and back."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlite.core import maps
from peftlite.core import targets as patterns
from peftlite.core.attach import deltas
from peftlite.core.patch import Targets
from peftlite.core.site import Site, sites, walk
from peftlite.core.tensors import bytes_in, is_quantized, is_sharded, raw
from peftlite.core.turns import in_turn
from peftlite.errors import PeftliteError, TargetError
from peftlite.fields import check_given
from peftlite.io import base
from peftlite.quant import beside, keys, nf4
from peftlite.quant.holder import hold, packings, release
from peftlite.quant.packed import Packed
from peftlite.quant.packing import KINDS, Packing, pack, pack_beside
from peftlite.table import Shown, size, table

SMALL = 4096
"""Fewer numbers than these aren't worth their scales, and are left by default."""

_PIECE = 1 << 18  # numbers that are compared at a time


@dataclass(frozen=True)
class Quantization:
    """What `quantize` takes, told as methods tell what they take.

    Args:
        in_blocks: whether it takes by default what is in numbered blocks alone.
    """

    in_blocks: bool = False
    takes: ClassVar = "tensors of two or more dimensions, of floats in 16 bits or more"

    def accepts(self, site: Site) -> bool:
        return not site.is_call and site.is_stored and site.whole.dim() > 1

    def default(self, site: Site) -> bool:
        if not self.accepts(site) or site.head or site.whole.numel() < SMALL:
            return False
        if self.in_blocks and not any(step.isdigit() for step in site.address.split(".")):
            return False
        return not isinstance(site.module, nn.Embedding | nn.EmbeddingBag)

    def choose(self, picked: list[Site], _: Any) -> list[Site]:
        return picked


@dataclass(frozen=True, repr=False)
class Packs(Shown):
    """What `quantize` did; printing it shows a table.

    Attributes:
        kind: the format; those that a checkpoint has.
        shapes: of the tensors, by address, as all of these.
        bytes_before: of each.
        bytes_after: of its codes, and all that is beside them.
        errors: ‖W − Ŵ‖ / ‖W‖, in the Frobenius norm; NaN of what was packed before.
        config: what config.json says of them as its `quantization_config`, so that transformers
            reads a saved model with bitsandbytes; None where that has no such layers.
    """

    kind: str
    shapes: dict[str, tuple[int, ...]]
    bytes_before: dict[str, int]
    bytes_after: dict[str, int]
    errors: dict[str, float]
    config: Mapping[str, Any] | None = None

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes of the tensors, before and after."""
        return sum(self.bytes_before.values()), sum(self.bytes_after.values())

    def _add(self, address: str, w: Tensor, how: Packing, parts: Mapping[str, Tensor]) -> None:
        self.shapes[address], self.bytes_before[address] = tuple(w.shape), w.nbytes
        self.bytes_after[address] = sum(part.nbytes for part in parts.values())
        self.errors[address] = _error(how.unpack(parts), w)

    def _summary(self) -> str:
        before, after = self.nbytes
        return f"{self.kind}: {len(self.shapes)} tensors, {size(before)} in {size(after)}"

    def _lines(self) -> Iterator[str]:
        columns = {
            "tensor": [*self.shapes],
            "shape": ["×".join(map(str, shape)) for shape in self.shapes.values()],
            "bytes": [size(count) for count in self.bytes_before.values()],
            "packed": [size(count) for count in self.bytes_after.values()],
            "error": [_shown(error) for error in self.errors.values()],
        }
        yield table([*columns], [*zip(*columns.values(), strict=True)])
        yield self._summary()


def _error(made: Tensor, w: Tensor) -> float:
    """‖W − Ŵ‖ / ‖W‖, in pieces: nothing of the size of W is formed in fp32."""
    pieces = zip(made.reshape(-1).split(_PIECE), w.reshape(-1).split(_PIECE), strict=True)
    pairs = ((a.float(), b.float()) for a, b in pieces)
    norms = torch.stack([torch.stack([(a - b).norm(), b.norm()]) for a, b in pairs]).norm(dim=0)
    return float(norms[0] / norms[1].clamp(min=1e-38))


def _shown(error: float) -> str:
    return "" if math.isnan(error) else f"{error:.4f}"


@in_turn
def quantize(
    model: nn.Module,
    kind: str = "nf4",
    targets: Targets = None,
    skip: Targets = (),
    double_quant: bool = True,
    block: int = nf4.BLOCK,
    scales: str = "absmax",
    rank: int = 0,
    init: str = "loftq",
    iterations: int = 1,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Packs:
    """W → codes and scales: packs large weights of a base in place, and freezes them.

    The model is used as before: its tensors are read as what the codes stand for, and deltas
    attach, train, save and load on it. Codes take no gradient, and nothing but `dequantize` or a
    load of a state dict changes a byte of them. In a state dict 4-bit tensors have the keys and
    bytes of bitsandbytes.

    Args:
        kind: "nf4", 4.13 bits a weight (4.5 without double quantisation); "int8" or "fp8"
            (e4m3), 8 bits and a scale in fp32 for each row.
        targets: as for methods. By default all tensors with two or more dimensions and 4,096 or
            more numbers, but embeddings and the output head.
        skip: what to leave, as `exclude` for methods.
        double_quant: whether nf4 keeps its scales in 8 bits, too. Dettmers et al.,
            arXiv:2305.14314.
        block: weights that share one of nf4's scales: a power of 2 from 32 to 4096.
        scales: "absmax", the largest of the block, or "search", the one of ten that errs least.
        rank: r of a product LR beside the codes Q, in the tensor's dtype, which makes up for what
            those lose: W is read as Q + LR. It is of the base, and as frozen; 0 for none.
        init: which comes first. "loftq": Q of W, then LR is the first r singular directions of
            what is lost (Li et al., arXiv:2310.08659, algorithm 1); "pissa": LR the first of W,
            then Q of the rest (QPiSSA, Meng et al., arXiv:2404.02948, §4), and LR once more.
        iterations: how often Q and LR are found, each of what the other leaves.
        checkpoint: a safetensors file or a folder with all of the model's tensors, of which some
            are packed: they are read from there, and no other argument is given. The model may be
            on the meta device, so that it is never there unpacked.

    Raises:
        PeftliteError: deltas are attached, a tensor is packed already, isn't finite, or is of
            another dtype, or an argument is out of range. Nothing has changed.
        FileError: a checkpoint is missing or damaged, or isn't the model's. Nothing has changed.

    Example:
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        print(pl.quantize(model, "nf4"))
        pl.attach(model, pl.LoRA(rank=4, targets="0"))
    """
    how = how_of(kind, double_quant, block, scales, rank, init, iterations)
    _refuse_deltas(model)
    if checkpoint is not None:
        if (targets, skip, how) != (None, (), how_of()):
            raise PeftliteError("a checkpoint says what is packed, and how: give it alone")
        return _read(model, checkpoint)
    return _pack(model, _chosen(model, targets, skip), how)


def how_of(
    kind: str = "nf4",
    double: bool = True,
    block: int = nf4.BLOCK,
    scales: str = "absmax",
    rank: int = 0,
    init: str = "loftq",
    iterations: int = 1,
) -> dict[str, Any]:
    """What `pack` takes, or `pack_beside` where there is a rank. Raises PeftliteError."""
    check_given("kind", kind, KINDS)
    check_given("scales", scales, ("absmax", "search"))
    check_given("block", block, nf4.SIZES)
    check_given("init", init, beside.INITS)
    check_given("double_quant", double, (True, False))
    for name, given, least in (("rank", rank, 0), ("iterations", iterations, 1)):
        if type(given) is not int or given < least:
            raise PeftliteError(f"{name} must be a whole number from {least} up, not {given!r}")
    _refuse_unused(
        kind != "nf4",
        f"{kind} has one scale a row, in fp32",
        double_quant=not double,
        block=block != nf4.BLOCK,
        scales=scales != "absmax",
    )
    _refuse_unused(not rank, "rank is 0", init=init != "loftq", iterations=iterations != 1)
    how: dict[str, Any] = {"kind": kind, "double": double, "block": block}
    how["search"] = scales == "search"
    return how | ({"rank": rank, "init": init, "iterations": iterations} if rank else {})


def _refuse_unused(unused: bool, why: str, **given: bool) -> None:
    """Raises PeftliteError if an argument is given that would change nothing."""
    for name in [name for name, one in given.items() if one and unused]:
        raise PeftliteError(f"{name} would change nothing, as {why}: leave it out")


def _pack(model: nn.Module, chosen: list[Site], how: Mapping[str, Any]) -> Packs:
    found, packs = [], Packs(how["kind"], {}, {}, {}, {})
    for site in chosen:
        w, stack = site.whole.detach(), len(site.layout.stack)
        packed = pack_beside(w, stack=stack, **how) if "rank" in how else pack(w, **how)
        found.append((site, *packed))
        packs._add(site.address, w, *packed)
    for site, packing, parts in found:
        codes = nn.Parameter(parts[""], requires_grad=False)
        for module, slot in site.owners:
            hold(module, slot, packing, codes, parts)
    return replace(packs, config=_config(model, found, how["double"]))


def _read(model: nn.Module, checkpoint: str | os.PathLike[str]) -> Packs:
    """Fills a model from a checkpoint."""
    packs, kinds = Packs("", {}, {}, {}, {}), {}
    for place, how in base.read(model, checkpoint):
        name, kinds[how.kind] = place.names[0], None
        packs.shapes[name], packs.errors[name] = tuple(how.shape), math.nan
        packs.bytes_before[name] = how.shape.numel() * how.dtype.itemsize
        packs.bytes_after[name] = bytes_in(raw(*place.owners[0]))
    return replace(packs, kind=", ".join(kinds) or "nothing")


def _config(
    model: nn.Module, found: list[tuple[Site, Packing, Any]], double: bool
) -> Mapping[str, Any] | None:
    """What transformers has to know, where it has a layer of bitsandbytes for each tensor."""
    theirs = all(
        how.kind == "nf4" and "left" not in parts and maps.kind_of(site.module) is maps.Linear
        for site, how, parts in found
    )
    if not found or not theirs:
        return None
    left = [path for path, m in walk(model) if isinstance(m, nn.Linear) and not packings(m)]
    return keys.config("nf4", found[0][1].dtype, double, left)


def saved(model: nn.Module) -> int:
    """The bytes fewer that a model would have after `quantize`, as that is by default."""
    found = 0
    for site in sites(model):
        if Quantization().default(site) and not is_quantized(site.whole):
            w = site.whole
            found += w.nbytes - Packing("nf4", w.shape, w.dtype, nf4.BLOCK).nbytes(nested=True)
    return found


def _refuse_deltas(model: nn.Module) -> None:
    for name in deltas(model):
        raise PeftliteError(
            f"{name!r} is attached, and knows its base by the very numbers: pl.detach it first"
        )


def _chosen(model: nn.Module, asked: Targets, skip: Targets) -> list[Site]:
    """The sites to pack. Raises PeftliteError if one can't be."""
    chosen = pick(model, asked, skip)
    for site in chosen:
        w = site.whole
        if is_sharded(w) or w.is_meta:
            raise PeftliteError(f"{site.address} isn't here whole: quantise before it is sharded")
        if not w.isfinite().all():
            raise PeftliteError(f"{site.address} has numbers that aren't finite")
    return chosen


def pick(model: nn.Module, asked: Targets, skip: Targets, in_blocks: bool = False) -> list[Site]:
    """The sites that are asked for. Raises PeftliteError."""
    how: Any = Quantization(in_blocks)
    chosen = [site for site, _ in patterns.select(sites(model), asked, skip, how)]
    for site in chosen:
        w = site.whole
        if w.is_floating_point() and is_quantized(w):
            kind = w.packing.kind if isinstance(w, Packed) else type(w).__name__
            raise PeftliteError(f"{site.address} is packed already, as {kind}: skip it")
        floats = w.is_floating_point() and w.dtype.itemsize > 1
        if not how.accepts(site) or not floats or not w.numel():
            raise TargetError(
                f"{site.address} is {w.dtype} of {tuple(w.shape)}; quantize takes {how.takes}"
            )
    return chosen


@in_turn
def dequantize(model: nn.Module) -> None:
    """Codes → Ŵ: what `quantize` packed is plain again, frozen, and what the codes stood for.

    Raises:
        PeftliteError: deltas are attached, or the codes are sharded. Nothing has changed.

    Example:
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        pl.quantize(model, "int8")
        pl.dequantize(model)
    """
    _refuse_deltas(model)
    plain: dict[int, nn.Parameter] = {}
    for module in [*model.modules()]:
        for slot in [*packings(module)]:
            w, codes = raw(module, slot), module._parameters[slot]
            if is_sharded(w):
                raise PeftliteError(f"{slot!r} isn't here whole: dequantise before it is sharded")
            if id(codes) not in plain:
                plain[id(codes)] = nn.Parameter(w.form(), requires_grad=False)
            release(module, slot, plain[id(codes)])
