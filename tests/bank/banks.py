"""What the tests of a bank share: a base, and models that have one delta each."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.bank import DeltaBank

WIDTH = 12


def base(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 8)
    ).to(dtype)


@torch.no_grad()
def tuned(model: nn.Module, method: pl.Method | Sequence[pl.Method], name: str) -> nn.Module:
    """A copy of a model with a delta that changes much."""
    twin = copy.deepcopy(model)
    for parameter in pl.attach(twin, method, name).parameters():
        parameter.normal_(std=0.5)
    return twin


def lora(rank: int = 3, **options: object) -> pl.LoRA:
    return pl.LoRA(rank=rank, alpha=5, targets="weight", **options)  # type: ignore


class Models:
    """A base, a bank on a copy of it, and a model of its own for every delta."""

    def __init__(self, names: str, slots: int = 4, max_rank: int = 8, **options: object):
        self.base = base()
        self.alone: dict[str | None, nn.Module] = {None: self.base}
        for i, name in enumerate(names):
            self.alone[name] = tuned(self.base, lora(rank=1 + i % max_rank), name)
        self.model = copy.deepcopy(self.base)
        self.bank = DeltaBank(self.model, slots, max_rank, methods=lora(), **options)  # type: ignore
        for name in names:
            self.bank.load(name, self.delta(name))

    def delta(self, name: str) -> pl.Delta:
        return pl.deltas(self.alone[name])[name]

    def want(self, x: Tensor, names: Sequence[str | None]) -> Tensor:
        """Each row run alone, through the model of its delta."""
        each = len(x) // len(names)
        with torch.no_grad():
            rows = [self.alone[names[i // each]](x[i : i + 1]) for i in range(len(x))]
        return torch.cat(rows)

    def check(self, names: Sequence[str | None], x: Tensor | None = None) -> None:
        x = torch.randn(len(names), 3, WIDTH, dtype=torch.float64) if x is None else x
        with torch.no_grad(), self.bank.rows(names, repeat=len(x) // len(names)):
            torch.testing.assert_close(self.model(x), self.want(x, names))


def resident(bank: DeltaBank) -> list[str]:
    """The names of the deltas that are in slots, the least recently used first."""
    return [entry.name for entry in bank._slots.resident]
