"""The laws that hold of every delta, each measured on the demo's model."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import peftlite as pl

ROUNDING = 1e-4  # of fp32, on logits between about -20 and 20


@dataclass(frozen=True)
class Law:
    """A claim, whether it holds here, and the number that says so."""

    claim: str
    holds: bool
    measured: str

    def __str__(self) -> str:
        return f"{'holds' if self.holds else 'FAILS'}  {self.claim:<46}  {self.measured}"


@torch.no_grad()
def answer(model: nn.Module, x: Tensor, name: str | None) -> Tensor:
    """The logits under one choice."""
    with pl.using(model, name):
        return model(x)


def answers(model: nn.Module, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The logits under each choice."""
    return {name: answer(model, x, name) for name in names}


def same_bits(
    claim: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor], what: str
) -> Law:
    """Holds if every fp32 number of `got` has the bits it has in `want`."""
    differ = sum(int((got[key].view(torch.int32) != want[key].view(torch.int32)).sum())
                 for key in want)
    count = sum(tensor.numel() for tensor in want.values())
    return Law(claim, not differ and got.keys() == want.keys(), f"{differ} of {count:,} {what} differ")


def same_numbers(claim: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> Law:
    """Holds if the two agree up to rounding."""
    apart = max(distance(got[key], want[key]) for key in want)
    return Law(claim, apart <= ROUNDING, f"max |Δ| {apart:.1e}, at most {ROUNDING:.0e}")


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@torch.no_grad()
def mixed_rows(model: nn.Module, x: Tensor, rows: Sequence[str | None]) -> Law:
    """One batch, a choice for each row."""
    with pl.using(model, rows=rows):
        mixed = model(x)
    alone = [answer(model, row[None], name)[0] for row, name in zip(x, rows, strict=True)]
    return same_numbers("a mixed batch equals each row alone", {"x": mixed}, {"x": torch.stack(alone)})


@torch.no_grad()
def merging(model: nn.Module, x: Tensor, names: Sequence[str], base: Mapping[str, Tensor]) -> list[Law]:
    """Merging gives the same function, unmerging the same weights."""
    attached, merged = answers(model, x, names), {}
    for name in names:
        pl.merge(model, name)
        merged[name] = answer(model, x, None)
        pl.unmerge(model, name)
    state = model.state_dict()
    weights = {key: state[key] for key in base}
    return [
        same_numbers("merged equals attached", merged, attached),
        same_bits("unmerge restores every bit", weights, base, "base weights"),
    ]


def threads(model: nn.Module, x: Tensor, names: Sequence[str], calls: int = 25) -> Law:
    """Threads that choose differently at the same time each get their own delta's answers."""
    want = answers(model, x, names)
    start = threading.Barrier(len(names))

    def serve(name: str) -> int:
        start.wait()
        return sum(distance(answer(model, x, name), want[name]) > ROUNDING for _ in range(calls))

    with ThreadPoolExecutor(len(names)) as pool:
        wrong = sum(pool.map(serve, names))
    apart = distance(*(want[name] for name in names))
    ...
