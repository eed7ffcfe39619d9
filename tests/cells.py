"""Cells: a row of a card on a kind of model, attached so that it makes a difference."""

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor, nn

import peftlite as pl
from peftlite.core.values import applied, by_tensor
from peftlite.quant.packed import Packed
from tests.cards import ROWS
from tests.cards.card import Row
from tests.zoo import KINDS, Kind, seeded

DEAR = ("hf_bert", "hf_gpt2", "hf_llama", "hf_t5", "hf_vit")
"""The kinds that take ten times as long as others."""


@functools.cache
def first_block(kind: Kind) -> Kind:
    """The kind's models with the first of their blocks alone, where all are alike."""

    def make() -> nn.Module:
        model = kind.make()
        for module in list(model.modules()):
            if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1:
                del module[1:]
        return model

    return replace(kind, make=make)


def cells_of(row: Row, kind: Kind) -> Iterator[ParameterSet]:
    """A row on a kind; of real models the first block alone, and all of it in the slow run.

    What a second block tells of the first is seen on the small GPTs. Rows for unusual tensors meet
    no real model but in the slow run: none has a tensor that gpt hasn't.
    """
    name, real = f"{row.name}-{kind}", kind.name in DEAR
    if real and not row.name.endswith("_anywhere"):
        yield pytest.param(row, first_block(kind), id=name)
    yield pytest.param(row, kind, id=f"{name}-whole" if real else name, marks=[SLOW] * real)


SLOW = pytest.mark.slow
CELLS = [
    cell
    for row in ROWS
    for kind in KINDS
    if (not row.only or kind.name in row.only) and kind.name not in row.refused
    for cell in cells_of(row, kind)
]
REFUSALS = [
    pytest.param(row, kind, id=f"{row.name}-{kind}")
    for row in ROWS
    for kind in KINDS
    if kind.name in row.refused
]


def attached(
    row: Row, kind: Kind, name: str = "a", dtype: torch.dtype = torch.float32, seed: int = 1
) -> tuple[nn.Module, pl.Delta]:
    """The kind's model with a delta that makes a difference."""
    model = kind.model(dtype)
    return model, add(model, row, name, seed)


@torch.no_grad()
def packed_again(row: Row, kind: Kind) -> nn.Module:
    """The kind's model whose tensors are, to the nearest code, what a delta makes of them."""
    model, delta = attached(row, kind, dtype=torch.float64)
    found = [(site, applied(patches, site.whole)) for site, patches in by_tensor(delta).values()]
    pl.detach(model, "a")
    for site, value in found:
        w = site.whole
        w.write(w.like(value)) if isinstance(w, Packed) else w.copy_(value)
    return model


def add(model: nn.Module, row: Row, name: str, seed: int = 1) -> pl.Delta:
    with seeded(seed):
        return disturb(pl.attach(model, row.method, name))


@torch.no_grad()
def disturb(delta: pl.Delta) -> pl.Delta:
    for parameter in delta.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return delta


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    # torch.testing.assert_close imports all of DTensor, in the time of a file of tests
    assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    same = torch.allclose(a, b, rtol=tolerance, atol=tolerance)
    assert same, f"up to {(a - b).detach().abs().max():g} apart"


class Graphs:
    """A compiler backend that counts the graphs it's given, and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.graphs += 1
        return graph.forward


def in_threads(*jobs: Callable[[], None]) -> None:
    """Runs the jobs at once, and raises what any of them raised."""
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        torch.set_num_threads(1)  # a thread has its own limit
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def unmergeable(delta: pl.Delta) -> str:
    """What `merge` says where it has nothing to merge, or nothing to merge into."""
    if not all(placed.patch.has_value for placed in delta.placed.values()):
        return "changes calls"
    stored = all(p.site.slot in p.site.module._parameters for p in delta.placed.values())
    return "" if stored else "computed by a parametrization"
