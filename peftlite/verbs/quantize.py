"""quantize and dequantize: the large weights of a frozen base in four or eight bits, and back."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftlite.core import maps
from peftlite.core import targets as patterns
from peftlite.core.attach import deltas
from peftlite.core.patch import Targets
from peftlite.core.site import Site, sites, walk
from peftlite.core.tensors import bytes_in, is_sharded, raw
from peftlite.core.turns import in_turn
from peftlite.errors import PeftliteError, TargetError
from peftlite.fields import check_given
from peftlite.io import base
from peftlite.quant import keys, nf4
from peftlite.quant.holder import hold, packings, release
from peftlite.quant.packed import Packed
from peftlite.quant.packing import KINDS, Packing, pack
from peftlite.table import Shown, size, table

SMALL = 4096
"""Fewer numbers than these aren't worth their scales, and are left by default."""


class Quantization:
    """What `quantize` takes, told as methods tell what they take."""

    takes = "tensors of two or more dimensions, of floats in 16 bits or more"

    def accepts(self, site: Site) -> bool:
        return not site.is_call and site.is_stored and site.whole.dim() > 1

    def default(self, site: Site) -> bool:
        if not self.accepts(site) or site.head or site.whole.numel() < SMALL:
            return False
        return not isinstance(site.module, nn.Embedding | nn.EmbeddingBag)

    def choose(self, picked: list[Site], _: Any) -> list[Site]:
        return picked


@dataclass(frozen=True, repr=False)
class Packs(Shown):
    """What `quantize` did; printing it shows a table.

    Attributes:
        kind: the format; those that a checkpoint has.
        rows: for each tensor its address, shape, bytes before and after, and
            ‖W − Ŵ‖ / ‖W‖, the relative error in the Frobenius norm; NaN of what was packed before.
        config: what config.json says of them as its `quantization_config`, so that transformers
            reads a saved model with bitsandbytes; None where that has no such layers.
    """

    kind: str
    rows: tuple[tuple[str, tuple[int, ...], int, int, float], ...]
    config: Mapping[str, Any] | None = None

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes of the tensors, before and after."""
        return sum(row[2] for row in self.rows), sum(row[3] for row in self.rows)

    def _summary(self) -> str:
        before, after = self.nbytes
        return f"{self.kind}: {len(self.rows)} tensors, {size(before)} in {size(after)}"

    def _lines(self) -> Iterator[str]:
        shown = [
            [address, "×".join(map(str, shape)), size(before), size(after), _shown(error)]
            for address, shape, before, after, error in self.rows
        ]
        yield table(["tensor", "shape", "bytes", "packed", "error"], shown)
        yield self._summary()


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
    check_given("kind", kind, KINDS)
    check_given("scales", scales, ("absmax", "search"))
    check_given("block", block, nf4.SIZES)
    _refuse_deltas(model)
    if checkpoint is not None:
        given = (kind, targets, skip, double_quant, block, scales)
        if given != ("nf4", None, (), True, nf4.BLOCK, "absmax"):
            raise PeftliteError("a checkpoint says what is packed, and how: give it alone")
        return _read(model, checkpoint)
    return _pack(model, kind, _chosen(model, targets, skip), double_quant, block, scales)


def _pack(
    model: nn.Module, kind: str, chosen: list[Site], double: bool, block: int, scales: str
) -> Packs:
    found, rows = [], []
    for site in chosen:
        w = site.whole.detach()
        how, parts = pack(w, kind, block, double, search=scales == "search")
        found.append((site, how, parts))
        error = (how.unpack(parts).float() - w.float()).norm() / w.float().norm().clamp(min=1e-38)
        after = sum(part.nbytes for part in parts.values())
        rows.append((site.address, tuple(w.shape), w.nbytes, after, float(error)))
    for site, how, parts in found:
        codes = nn.Parameter(parts[""], requires_grad=False)
        for module, slot in site.owners:
            hold(module, slot, how, codes, parts)
    return Packs(kind, tuple(rows), _config(model, found, double))


def _read(model: nn.Module, checkpoint: str | os.PathLike[str]) -> Packs:
    """Fills a model from a checkpoint."""
    rows, kinds = [], {}
    for place, how in base.read(model, checkpoint):
        kinds[how.kind] = None
        before, after = how.shape.numel() * how.dtype.itemsize, bytes_in(raw(*place.owners[0]))
        rows.append((place.names[0], tuple(how.shape), before, after, math.nan))
    return Packs(", ".join(kinds) or "nothing", tuple(rows))


def _config(
    model: nn.Module, found: list[tuple[Site, Packing, Any]], double: bool
) -> Mapping[str, Any] | None:
    """What transformers has to know, where it has a layer of bitsandbytes for each tensor."""
    hows = [how for _, how, _ in found]
    theirs = all(
        how.kind == "nf4" and maps.kind_of(site.module) is maps.Linear for site, how, _ in found
    )
    if not found or not theirs:
        return None
    left = [path for path, m in walk(model) if isinstance(m, nn.Linear) and not packings(m)]
    return keys.config(hows[0].dtype, double, left)


def _refuse_deltas(model: nn.Module) -> None:
    for name in deltas(model):
        raise PeftliteError(
            f"{name!r} is attached, and knows its base by the very numbers: pl.detach it first"
        )


def _chosen(model: nn.Module, asked: Targets, skip: Targets) -> list[Site]:
    """The sites to pack. Raises PeftliteError if one can't be."""
    how: Any = Quantization()
    chosen = [site for site, _ in patterns.select(sites(model), asked, skip, how)]
    for site in chosen:
        w = site.whole
        if isinstance(w, Packed):
            raise PeftliteError(f"{site.address} is packed already, as {w.packing.kind}: skip it")
        if not how.accepts(site) or not w.is_floating_point() or w.dtype.itemsize < 2:
            raise TargetError(
                f"{site.address} is {w.dtype} of {tuple(w.shape)}; quantize takes {how.takes}"
            )
        if is_sharded(w) or w.is_meta:
            raise PeftliteError(f"{site.address} isn't here whole: quantise before it is sharded")
        if not w.isfinite().all():
            raise PeftliteError(f"{site.address} has numbers that aren't finite")
    return chosen


@in_turn
def dequantize(model: nn.Module) -> None:
    """Codes → Ŵ: what `quantize` packed is plain again, frozen, and what the codes stood for.

    Raises:
        PeftliteError: deltas are attached. Nothing has changed.

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
            if id(codes) not in plain:
                plain[id(codes)] = nn.Parameter(w.form(), requires_grad=False)
            release(module, slot, plain[id(codes)])
