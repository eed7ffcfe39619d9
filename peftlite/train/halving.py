"""Halving: of runs that train together the worse end on the way, by how they would fare at rest.

Amid training a high rate looks worse than it ends, for its steps still leap about. The mean of a
run's steps θ₁ … θₜ, each weighted by its number,

    mₜ = mₜ₋₁ + 2/(t + 1)·(θₜ − mₜ₋₁),

is about where a rate that falls to zero by now would have led (Lacoste-Julien et al.,
arXiv:1212.2002; Defazio et al., arXiv:2310.07831). So a run is judged by the metric of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftlite.train.measure import best_of

RUNGS = ((1 / 16, 1 / 8), (5 / 8, 0.0))
"""After which share of its epochs a run is judged, and which share of all go on then."""
LEAST = (2, 1)
"""How many go on, if that is fewer."""


class Halving:
    """Runs that are judged by a metric."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.contenders: list[Contender] = []

    def contender(self, end: Callable[[], None]) -> Contender:
        """One more of them, and what ends it."""
        self.contenders.append(Contender(self, end))
        return self.contenders[-1]

    def go_on(self, rung: int) -> list[Contender]:
        """The best of those that were judged at a rung."""
        sign = 1 if best_of(self.metric) is min else -1

        def rank(each: Contender) -> tuple[bool, float]:
            value = each.values[rung]
            return math.isnan(value), sign * value

        judged = [each for each in self.contenders if rung in each.values]
        most = max(LEAST[rung], math.ceil(RUNGS[rung][1] * len(self.contenders)))
        return sorted(judged, key=rank)[:most]


class Contender:
    """What a run knows of the others: how it was judged, and whether it goes on.

    Attributes:
        meet: waits for the others, until each of them waits or is over.
        values: of the metric, by the rung at which it was judged.
        is_out: whether it was to end.
    """

    def __init__(self, halving: Halving, end: Callable[[], None]) -> None:
        self._halving, self._end = halving, end
        self.meet: Callable[[], None] = lambda: None
        self.values: dict[int, float] = {}
        self.is_out = False
        self._mean: list[Tensor] = []

    @torch.no_grad()
    def step(self, parameters: list[Any], number: int) -> None:
        """Adds a step, from 1, to their mean."""
        if not self._mean:
            self._mean = [p.detach().clone() for p in parameters]
        torch._foreach_lerp_(self._mean, parameters, 2 / (number + 1))  # type: ignore[attr-defined]

    def rung(self, epoch: int, epochs: int) -> int | None:
        """At which a run is judged after an epoch, if at any."""
        ends = [max(1, round(share * epochs)) for share, _ in RUNGS]
        return ends.index(epoch) if epoch in ends and epoch < epochs else None

    @torch.no_grad()
    def judge(self, rung: int, parameters: list[Any], found: Callable[[], float]) -> None:
        """Notes the metric that is found with the mean of the steps in place of them."""
        own = [p.detach().clone() for p in parameters]
        torch._foreach_copy_(parameters, self._mean)  # type: ignore[attr-defined]
        try:
            self.values[rung] = found()
        finally:
            torch._foreach_copy_(parameters, own)  # type: ignore[attr-defined]

    def await_verdict(self, rung: int) -> None:
        """Ends, once all are judged, unless it is among the best."""
        self.meet()
        if self not in self._halving.go_on(rung):
            self.is_out = True
            self._end()

    @property
    def metric(self) -> str:
        """By which it is judged."""
        return self._halving.metric

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        values = {str(rung): torch.tensor(value) for rung, value in self.values.items()}
        return {"mean": self._mean, "values": values}

    def load_state(self, tree: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self._mean = [*tree["mean"]]
        self.values = {int(rung): value.item() for rung, value in tree["values"].items()}
