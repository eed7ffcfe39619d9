"""Experts: LoRA of a Linear for each expert, where the model has all experts in one parameter.

transformers 4 had `experts.3.w1`, and 5 has `experts.gate_up_proj` (e, o, i), the first half of
whose outputs are w1's:

    A = [A₁; A₃] (e, 2r, i),    B = [B₁ 0; 0 B₃] (e, o, 2r)
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from peftlite.errors import FileError
from peftlite.io.peft.form import Layer, fit
from peftlite.io.peft.forms import FORMS
from peftlite.io.peft.reading.adapter import Adapter, Claim, Left
from peftlite.methods.lora import LoRA
from peftlite.table import listed

# the parameter, and which of its halves
_PARTS = {
    name: its
    for gate, up, down in (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))
    for name, its in (
        (gate, ("gate_up_proj", 0)), (up, ("gate_up_proj", 1)), (down, ("down_proj", None)),
    )
}  # fmt: skip
_KEY = re.compile(r"(.*)\.(\d+)\.(\w+)\.lora_([AB])\.weight")


def read_experts(adapter: Adapter, left: Left) -> Iterator[Claim]:
    """The parameters of all experts that the file has a Linear of each for."""
    found: dict[str, dict[str, str]] = {}
    for rest, key in left.items():
        its = _KEY.fullmatch(rest) if adapter.kind == "LORA" else None
        if its is None or its[3] not in _PARTS:
            continue
        address = f"{its[1]}.{_PARTS[its[3]][0]}"
        if address in adapter.sites and f"{its[1]}.{its[2]}" not in adapter.modules:
            found.setdefault(address, {})[rest] = key
    for address, keys in found.items():
        yield _claim(adapter, address, keys)


def _claim(adapter: Adapter, address: str, keys: Mapping[str, str]) -> Claim:
    """One parameter's change."""
    site, path = adapter.sites[address], address.rpartition(".")[0]
    e, o, i = site.whole.shape
    halves = {name: _PARTS[name][1] for name in (rest.split(".")[-3] for rest in keys)}
    names = sorted(halves, key=lambda name: halves[name] or 0)
    wanted = [[f"{path}.{n}.{name}" for n in range(e)] for name in names]
    _check(adapter, [module for own in wanted for module in own], keys)
    methods = {module: _method(adapter, module, keys) for own in wanted for module in own}
    first, ranks = methods[wanted[0][0]], [max(methods[m].rank for m in own) for own in wanted]
    # as each has its own scale s, all have the first one's
    rank = sum(ranks)
    alpha = first.scale * (rank if first.scaling == "alpha/r" else math.sqrt(rank))
    method = replace(first, rank=rank, alpha=alpha)

    def make(t: dict[str, Tensor]) -> dict[str, Tensor]:
        like = next(iter(t.values()))
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in t.values()))
        a, b = (torch.zeros(e, *n, dtype=dtype, device=like.device) for n in ((rank, i), (o, rank)))
        start = 0
        for name, own, its in zip(names, wanted, ranks, strict=True):
            half = halves[name]
            rows = slice(o) if half is None else slice(half * (o // 2), (half + 1) * (o // 2))
            for n, module in enumerate(own):
                r = methods[module].rank
                a[n, start : start + r] = fit(t[f"{module}.lora_A.weight"], r, i)
                own_b = fit(t[f"{module}.lora_B.weight"], len(b[n, rows]), r)
                b[n, rows, start : start + r] = own_b * (methods[module].scale / first.scale)
            start += its
        return {f"{address}:a": a, f"{address}:b": b}

    return adapter.claim(keys, [(method, address)], make)


def _check(adapter: Adapter, wanted: Sequence[str], keys: Mapping[str, str]) -> None:
    """Raises FileError unless there is an A and a B for every expert, and no more."""
    lacking = [m for m in wanted if any(f"{m}.lora_{x}.weight" not in keys for x in "AB")]
    if lacking or len(keys) > 2 * len(wanted):
        raise FileError(
            f"{adapter.file.path!r} has {len(keys)} tensors of experts for the "
            f"{2 * len(wanted)} that this model has; it lacks {listed(lacking) or 'none'}"
        )


def _method(adapter: Adapter, module: str, keys: Mapping[str, str]) -> LoRA:
    t = adapter.meta({f"lora_{x}.weight": keys[f"{module}.lora_{x}.weight"] for x in "AB"})
    method: LoRA = FORMS["LORA"].method(adapter.config, Layer(module, expert=True), t)
    if method.init != "kaiming":
        raise ValueError(f"{module} begins as a part of a weight that this model has whole")
    return method
