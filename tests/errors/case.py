"""Case: what a stranger does to a model, and the whole message of the error it gives."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import peftlite as pl
from tests.zoo import KINDS

ZOO = {kind.name: kind for kind in KINDS}


@dataclass(frozen=True)
class Case:
    """What a stranger does to a model (and a path), and what it says."""

    act: Callable[[Any, Path], Any]
    says: str
    kind: type[Exception] = pl.PeftliteError
    model: Callable[[], Any] | None = None  # two deltas on a small GPT, if None
    file: Callable[[Path], Any] | None = None  # what stands at the path before


def bare() -> nn.Module:
    return ZOO["gpt"].model()


SMALL = pl.LoRA(rank=2, targets=["q_proj", "v_proj"])


def two() -> nn.Module:
    model = bare()
    pl.attach(model, SMALL, "sql")
    pl.attach(model, SMALL, "chat")
    return model


def delta(model: nn.Module) -> pl.Delta:
    return pl.deltas(model)["sql"]


def saving(model: nn.Module, path: Path) -> None:
    pl.save(delta(model), path)


def on(kind: str) -> Callable[[], nn.Module]:
    return ZOO[kind].model


def linears(n: int = 2, **options: Any) -> nn.Module:
    return nn.Sequential(*(nn.Linear(4, 4, **options) for _ in range(n)))


def attached(model: nn.Module, method: pl.Method) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        twin = copy.deepcopy(model)
        pl.attach(twin, method, "sql")
        return twin

    return build
