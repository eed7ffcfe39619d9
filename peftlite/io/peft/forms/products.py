"""LoHa, HiRA and LoKr in PEFT: elementwise and Kronecker products of factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from peftlite.core import maps
from peftlite.core.layout import Layout
from peftlite.core.patch import Method
from peftlite.core.site import Site
from peftlite.errors import PeftliteError
from peftlite.io.peft.config import Config
from peftlite.io.peft.form import Form, Layer, Parts, Tensors, agreed, fit, rank_of, size_of
from peftlite.methods.full import FullTuning
from peftlite.methods.hira import HiRA
from peftlite.methods.loha import LoHa
from peftlite.methods.lokr import LoKr, split


class LoHaForm(Form):
    type = "LOHA"
    kinds: ClassVar[tuple[type[Method], ...]] = (LoHa,)
    names: ClassVar[tuple[tuple[str, str], ...]] = (
        *((f"hada_w{k}_{x}", f"w{k}{x}") for k in (1, 2) for x in "ab"),
        ("hada_t1", "core1"), ("hada_t2", "core2"),
    )  # fmt: skip
    convs: ClassVar[tuple[int, ...]] = (1, 2)

    def method(self, config: Config, layer: Layer, t: Tensors) -> LoHa:
        alpha = config.patterned("alpha_pattern", layer.name, config.number("alpha", 8))
        return LoHa(rank=rank_of(config, layer, size_of(t, "hada_w1_b")), alpha=alpha)

    def settings(self, method: LoHa, patch: Any) -> dict[str, Any]:
        return {"r": method.rank, "alpha": method.scale * method.rank}

    def ours(self, t: Tensors, layer: Layer) -> Tensors:
        return flat(flat(super().ours(t, layer), "core1", "w1"), "core2", "w2")


def flat(found: Tensors, core: str, name: str) -> Tensors:
    """A Tucker product of a kernel, core (r, r, k…) with a (r, o) and b (r, i), as one of a matrix.

    It has a (o, r) as it is, and with b (r, i·k…) the core is multiplied.
    """
    if core not in found:
        return found
    a, b, core_ = found[f"{name}a"], found[f"{name}b"], found[core]
    merged = torch.einsum("pq...,qi->pi...", core_, b).flatten(1)
    return {k: x for k, x in found.items() if k != core} | {f"{name}a": a.mT, f"{name}b": merged}


class HiRAForm(Form):
    type = "HIRA"
    kinds: ClassVar[tuple[type[Method], ...]] = (HiRA,)
    names: ClassVar[tuple[tuple[str, str], ...]] = (
        ("hira_A", "a"), ("hira_embedding_A", "a"), ("hira_B", "b"), ("hira_embedding_B", "b"),
    )  # fmt: skip
    layers: ClassVar[tuple[type[maps.Map], ...]] = (
        maps.Linear,
        maps.TransposedLinear,
        maps.Embedding,
    )
    convs: ClassVar[tuple[int, ...]] = (1, 2, 3)

    def method(self, config: Config, layer: Layer, t: Tensors) -> HiRA:
        found = size_of(t, "hira_A", "hira_embedding_A")
        rank = agreed(config, layer, "r", config.number("r", 32), found)
        return HiRA(rank=rank, dropout=config.number("hira_dropout", 0.0))

    def settings(self, method: HiRA, patch: Any) -> dict[str, Any]:
        return {"r": method.rank, "hira_dropout": method.dropout}

    def joined(self, settings: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        if len(ranks := {its["r"] for its in settings.values()}) > 1:
            raise PeftliteError(
                f"peft has one rank for all modules of a HiRA, whatever rank_pattern says, and "
                f"this delta has {', '.join(map(str, sorted(ranks)))}: attach what differs as "
                "another delta"
            )
        return super().joined(settings)

    def ours(self, t: Tensors, layer: Layer) -> Tensors:
        found = super().ours(t, layer)
        if not layer.taps:
            return found
        kernel = layer.site.whole.shape[1:]
        return {
            "a": fit(found["a"], -1, *kernel).flatten(1),
            "b": fit(found["b"], -1, -1, *layer.ones).flatten(1),
        }

    def theirs(self, patch: Any, layer: Layer) -> Tensors:
        a, b, ones = patch.a.detach(), patch.b.detach(), layer.ones
        if ones:
            a, b = a.reshape(len(a), *layer.site.shape[1:]), b.reshape(*b.shape, *ones)
        stem = "hira_embedding" if patch.layout.embeds else "hira"
        return {f"{stem}_A": a, f"{stem}_B": b}

    def taken(self, site: Site) -> bool:
        return super().taken(site) and site.layout.groups == 1


_MIXED_UP = "{} is a Conv1d, the taps of whose lokr_w2 peft mixes up, unless it's of a low rank"


def _both(layout: Layout) -> tuple[int, int]:
    """The dimensions that the factors are of."""
    return layout.rows, layout.columns // layout.taps


def _first(n: int, factor: int) -> int:
    """The part of n that goes to w1, which is the larger one if the factor is."""
    return factor if n % factor == 0 < factor else split(n, None if factor == -1 else factor)[0]


def _factor(method: LoKr, patch: Any) -> int:
    """The factor by which peft has a patch's sizes. Raises PeftliteError."""
    if not isinstance(method.factor, tuple):
        return method.factor or -1
    both = _both(patch.layout)
    for factor in (-1, *method.factor):
        if method.factor == tuple(_first(n, factor) for n in both):
            return factor
    raise PeftliteError(
        f"peft has one factor for both dimensions of a weight, and none makes a w1 of "
        f"{method.factor} at one of {both}: keep the delta with pl.save"
    )


class LoKrForm(Form):
    type = "LOKR"
    kinds: ClassVar[tuple[type[Method], ...]] = (LoKr,)
    names: ClassVar[tuple[tuple[str, str], ...]] = (
        *((f"lokr_w{k}{x}", f"w{k}{x[1:]}") for k in (1, 2) for x in ("", "_a", "_b")),
        ("lokr_t2", "core"),
    )
    convs: ClassVar[tuple[int, ...]] = (1, 2)

    def method(self, config: Config, layer: Layer, t: Tensors) -> LoKr:
        factor = int(config.number("decompose_factor", -1))
        rank = config.patterned("rank_pattern", layer.name, config.number("r", 8))
        for name in ("lokr_w1_b", "lokr_w2_b"):
            if name in t:
                agreed(config, layer, "r", rank, len(t[name]))
        says = [_first(n, factor) for n in (_both(layer.site.layout) if layer.site else ())]
        first = says
        if t:
            w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
            first = [*w1.shape]
        for its, found in zip(says, first, strict=False):
            agreed(config, layer, "decompose_factor", its, found)
        return LoKr(
            rank=int(rank),
            alpha=config.patterned("alpha_pattern", layer.name, config.number("alpha", 8)),
            factor=None if factor == -1 else (first[0], first[1]),
            decompose_both=config.flag("decompose_both"),
        )

    def settings(self, method: LoKr, patch: Any) -> dict[str, Any]:
        return {
            "r": method.rank, "alpha": method.scale * method.rank,
            "decompose_factor": _factor(method, patch), "decompose_both": method.decompose_both,
        }  # fmt: skip

    def parts(self, method: LoKr, t: Tensors, layer: Layer) -> Parts:
        if len(layer.taps) != 1 or "lokr_w2" not in t:
            return super().parts(method, t, layer)
        own = self.ours(t, layer)  # its taps among its inputs, in the order that peft has them
        w1 = own["w1"] if "w1" in own else own["w1a"] @ own["w1b"]
        d = method.scale * torch.kron(w1[None], own["w2"]).reshape(layer.site.whole.shape)
        return [(FullTuning(), {f"{layer.site.slot}:difference": d})]

    def ours(self, t: Tensors, layer: Layer) -> Tensors:
        found = flat(super().ours(t, layer), "core", "w2")
        if len(layer.taps) > 1 and "w2" in found:
            found["w2"] = fit(found["w2"], -1, -1, *layer.taps).flatten(1)
        return found

    def theirs(self, patch: Any, layer: Layer) -> Tensors:
        found = super().theirs(patch, layer)
        if layer.taps and "lokr_w2" in found:
            if len(layer.taps) == 1:
                raise PeftliteError(f"{_MIXED_UP.format(layer.path)}: attach with a smaller rank")
            w2 = found["lokr_w2"]
            found["lokr_w2"] = w2.reshape(len(w2), -1, *layer.taps)
        return found
