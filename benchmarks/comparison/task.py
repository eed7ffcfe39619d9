"""Task: a pretrained base, data to tune it on in three splits, and what the base itself is for."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from peftlite.core.patch import Target

Split = Literal["validation", "test"]


class Judgement(NamedTuple):
    """A model on a split: the loss, by which rates are chosen, and the quality that is shown."""

    loss: float
    quality: float


class Task(ABC):
    """A base, and what it is tuned on; made with a folder to cache in, and `quick` for a try.

    Attributes:
        quality: what the figure of quality is, as the plot names it.
        version: to be raised by a change after which older runs are no match for new ones.
        batch: the examples of a step.
        steps: of training, the same for every method; the most of them if there is `look`.
        look: steps from one look at the validation split to the next. Training ends when looks find
            nothing better there, and what was best is what counts. Without it, after `steps`.
        rate: the learning rate at which the search for a method's own begins.
        head: the output head. If `new_head`, it knows nothing of the data, so that every method
            trains it as well.
        narrow: the linear map that is too narrow for a rank of 8, if there is one.
        places: targets for what papers name: "attention", its maps; "keys" and "values" of it;
            "down", the last map of the feed-forward network.
        base: the pretrained model, to copy for every run.
    """

    name: ClassVar[str]
    quality: ClassVar[str]
    less_is_better: ClassVar[bool] = False
    version: ClassVar[int]
    batch: ClassVar[int]
    steps: int
    look: ClassVar[int] = 0
    rate: ClassVar[float]
    head: ClassVar[str]
    new_head: ClassVar[bool] = False
    narrow: ClassVar[str | None] = None
    places: ClassVar[Mapping[str, Target]]
    base: nn.Module

    def drawn(self, seed: int) -> Task:
        """The task as a seed sees it, where seeds have other examples to train on."""
        return self

    @abstractmethod
    def sample(self, draw: torch.Generator) -> Any:
        """A batch to train on."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """The losses of a batch's examples (b)."""

    @abstractmethod
    def judge(self, model: nn.Module, split: Split) -> Judgement: ...

    @functools.cached_property
    def begins(self) -> str:
        """The base's loss on the validation split, which tells bases that were trained apart."""
        return f"{self.judge(self.base, 'validation').loss:.3f}"

    @abstractmethod
    def own_loss(self, model: nn.Module) -> float:
        """The loss on held-out data of the kind that the base was made for."""
