"""The laws that every delta keeps, each measured on the demo's models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier
from typing import Any

import torch
from torch import Tensor, nn

import peftlite as pl

ROUNDING = 3e-4  # of fp32: two orders of summation put logits of about 20 some 1e-5 apart
CALLS = 20  # by each thread


@dataclass(frozen=True)
class Law:
    """A claim, whether it holds here, and the number that says so."""

    claim: str
    holds: bool
    measured: str

    def __str__(self) -> str:
        return f"{'holds' if self.holds else 'FAILS'}  {self.claim:<43}  {self.measured}"


@torch.no_grad()
def answer(model: nn.Module, x: Tensor, name: str | None) -> Tensor:
    """The logits under a choice."""
    with pl.using(model, name):
        return model(x)


@torch.no_grad()
def measure(
    base: nn.Module, trained: nn.Module, loaded: nn.Module, fresh: Mapping[str, Tensor], x: Tensor
) -> Iterator[Law]:
    """Measures every law in turn.

    Args:
        base: the model that nothing was ever attached to.
        trained: a copy of it with two deltas, as training left them.
        loaded: another copy with the same two, from their files. The last law takes them off.
        fresh: the logits with each delta as it was before training.
        x: three rows of bytes to compare on.
    """
    weights, after = base.state_dict(), trained.state_dict()
    got, want = _answers(loaded, x), _answers(trained, x)
    yield same_bits("a fresh attach changes no output", fresh, dict.fromkeys(fresh, base(x)))
    yield same_bits("training changes no base weight", {k: after[k] for k in weights}, weights)
    yield same_bits("a reloaded delta changes no output", got, want)
    yield mixed_rows(loaded, x)
    yield from merging(loaded, x, weights)
    yield threads(loaded, x)
    yield detaching(loaded, x, base)


def mixed_rows(model: nn.Module, x: Tensor) -> Law:
    """A batch with a choice per row, and each row by itself."""
    first, second = pl.deltas(model)
    rows = [first, None, second]
    with pl.using(model, rows=rows):
        mixed = model(x)
    alone = torch.cat([answer(model, x[i : i + 1], name) for i, name in enumerate(rows)])
    return close("a mixed batch equals each row alone", {"x": mixed}, {"x": alone})


def merging(model: nn.Module, x: Tensor, weights: Mapping[str, Tensor]) -> Iterator[Law]:
    """Each delta merged and unmerged, one after the other."""
    merged = {}
    for name in pl.deltas(model):
        pl.merge(model, name)
        merged[name] = answer(model, x, None)
        pl.unmerge(model, name)
    state = model.state_dict()
    yield close("merged equals attached", merged, _answers(model, x))
    yield same_bits("unmerge restores every bit", {k: state[k] for k in weights}, weights)


def threads(model: nn.Module, x: Tensor) -> Law:
    """One thread for each delta, all calling the same model at the same time."""
    want = _answers(model, x)
    start = Barrier(len(want))

    def strays(name: str) -> int:
        start.wait()
        return sum(_apart(answer(model, x, name), want[name]) > ROUNDING for _ in range(CALLS))

    with ThreadPoolExecutor(len(want)) as pool:
        astray = sum(pool.map(strays, want))
    measured = f"{astray} of {CALLS * len(want)} calls astray"
    return Law("two threads never see one another's choice", astray == 0, measured)


def detaching(model: nn.Module, x: Tensor, base: nn.Module) -> Law:
    """All deltas taken off: weights, keys, outputs, classes and requires_grad."""
    for name in list(pl.deltas(model)):
        pl.detach(model, name)
    got, want = ({**m.state_dict(), "outputs": m(x)} for m in (model, base))
    law = same_bits("detach restores every bit", got, want)
    return Law(law.claim, law.holds and _anatomy(model) == _anatomy(base), law.measured)


def same_bits(claim: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> Law:
    """Holds if both have the same keys, and every fp32 number the same bits."""
    pairs = [(got[key].view(torch.int32), want[key].view(torch.int32)) for key in want]
    changed = sum(int((a != b).sum()) for a, b in pairs)
    count = sum(b.numel() for _, b in pairs)
    holds = changed == 0 and got.keys() == want.keys()
    return Law(claim, holds, f"{changed} of {count:,} numbers differ")


def close(claim: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> Law:
    """Holds if the largest difference is one of rounding."""
    apart = max(_apart(got[key], want[key]) for key in want)
    return Law(claim, apart <= ROUNDING, f"max |Δ| {apart:.1e}, at most {ROUNDING:.0e}")


def _answers(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {name: answer(model, x, name) for name in pl.deltas(model)}


def _apart(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _anatomy(model: nn.Module) -> list[Any]:
    classes = [(path, type(module)) for path, module in model.named_modules()]
    return [*classes, *((name, p.requires_grad) for name, p in model.named_parameters())]
