"""R7 and R8: unmerging is exact to the bit, and what can't be merged whole isn't merged at all."""

from __future__ import annotations

import math
import random

import torch
from torch import nn

import peftlite as pl
from peftlite.core.tensors import raw
from tests.digest import bits
from tests.trust.tally import Tally, difference, state
from tests.zoo import KINDS, seeded

MLP = next(kind for kind in KINDS if kind.name == "mlp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METHODS = (
    pl.LoRA(rank=2), pl.DoRA(rank=2), pl.OFT(block_size=2), pl.IA3(), pl.FullTuning(),
    pl.SparseMask(fraction=0.2),
)  # fmt: skip


def attached(dtype: torch.dtype, method: pl.Method, *names: str) -> nn.Module:
    model = MLP.model(dtype)
    with seeded(), torch.no_grad():
        for name in names:
            for parameter in pl.attach(model, method, name).parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def r7(cycles: int, seed: int = 0) -> Tally:
    """Two deltas merged and unmerged in any order: how many ULP the base is off afterwards."""
    tally, rng, most = Tally(), random.Random(seed), 0
    for dtype in DTYPES:
        for method in METHODS:
            model = attached(dtype, method, "a", "b")
            was = {name: bits(p) for name, p in model.named_parameters()}
            for _ in range(cycles):
                for name in rng.choice(["aa", "abab", "abba"]):
                    merged = pl.deltas(model)[name].merged
                    (pl.unmerge if merged else pl.merge)(model, name)
                now = {name: bits(p) for name, p in model.named_parameters()}
                tally.check(now == was, f"{type(method).__name__} in {dtype}")
            most = max(most, _ulp(model))
    tally.notes.append(f"{len(METHODS)} methods in 3 dtypes; merged weights within {most} ULP")
    tally.check(most <= 1, f"a merged weight is {most} ULP from W + ΔW in fp64")
    return tally


def _ulp(model: nn.Module) -> int:
    """By how many steps of its dtype a merged weight is off its value in fp64, at most."""
    exact = {}
    delta = pl.deltas(model)["a"]
    for address, placed in delta.placed.items():
        w = placed.site.tensor
        if w.dtype is not torch.float32:  # computed in fp32, it rounds more than once
            exact[address] = placed.patch.double().value(w.double()).to(w.dtype)
            placed.patch.float()
    pl.merge(model, "a")
    steps = [_steps(delta.placed[a].site.tensor, value) for a, value in exact.items()]
    pl.unmerge(model, "a")
    return max(steps, default=0)


def _steps(a: torch.Tensor, b: torch.Tensor) -> int:
    ordered = []
    for t in (a, b):
        code = t.detach().contiguous().view(torch.int16).int()
        ordered.append(torch.where(code < 0, -(code & 0x7FFF), code))
    return int((ordered[0] - ordered[1]).abs().max())


def r8() -> Tally:
    """A merge of which one layer, each in turn, would not be finite: it changes none."""
    tally = Tally()
    for dtype in DTYPES:
        layers = len(pl.deltas(attached(dtype, METHODS[0], "a"))["a"].placed)
        for value in (math.nan, math.inf, -math.inf, 1e38):
            for layer in range(layers):
                model = attached(dtype, METHODS[0], "a")
                patch = [*pl.deltas(model)["a"].placed.values()][layer].patch
                with torch.no_grad():
                    for parameter in patch.parameters():
                        parameter.view(-1)[0] = value
                before = state(model)
                what = f"layer {layer} with {value} in {dtype}"
                tally.refused(lambda model=model: pl.merge(model, "a"), what)
                if changed := difference(before, state(model)):
                    tally.wrong.append(f"{what}: it changed {changed}")
                tally.check(raw_finite(model), f"{what}: a weight isn't finite")
    return tally


def raw_finite(model: nn.Module) -> bool:
    base = (m for m in model.modules() if type(m).__name__ == "Linear")
    return all(bool(raw(m, "weight").isfinite().all()) for m in base)
