"""Settings: what the numbers of a run depend on; and what a callback sees of its trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from peftlite.train.schedule import Schedule

Autocast = Literal["bf16", "fp16"]


@dataclass(frozen=True)
class Settings:
    """What the numbers of a run depend on, beside its model, data and functions.

    In this order they are printed, and stand in checkpoints, which go on with no others.

    Attributes:
        epochs, batch_size, lr: as `Trainer` has them, with a number in place of "auto".
        choice: the deltas that are chosen, in the order in which they apply.
        examples: of the training set.
        steps: of the optimizer, in all.
        processes: that train together.

    All others are as the arguments of `Trainer`.
    """

    epochs: int
    batch_size: int
    lr: float
    accumulate: int
    lr_multiplier: float
    b_ratio: float
    weight_decay: float
    schedule: Schedule
    warmup: float
    clip: float
    autocast: Autocast | None
    shuffle: bool
    metric: str
    patience: int | None
    seed: int
    examples: int
    steps: int
    processes: int
    choice: list[str]

    @property
    def micro_batch(self) -> int:
        """The most examples that all processes together have at a time."""
        return math.ceil(self.batch_size / self.accumulate)


class Training(Protocol):
    """The `Trainer` as callbacks are given it: its settings, and a way to end training."""

    @property
    def total_steps(self) -> int:
        """Steps of the optimizer, in all."""
        ...

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on, as JSON holds it."""
        ...

    def stop(self) -> None:
        """Ends training after the step at hand; `fit(resume=True)` goes on."""
