"""Tally: what was tried of a goal, how often, and what went wrong; and a model's whole state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import peftlite as pl
from peftlite.core import host
from tests.digest import bits, digest


@dataclass
class Tally:
    """The outcome of a trial."""

    tried: int = 0
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, right: bool, what: str) -> None:
        """Counts one case, which went wrong unless `right`."""
        self.tried += 1
        if not right:
            self.wrong.append(what)

    def refused(
        self, act: Callable[[], Any], what: str, kind: type[Exception] = pl.PeftliteError
    ) -> None:
        """Counts one case, which has to raise an error of this kind."""
        try:
            act()
            self.check(False, f"{what}: nothing was raised")
        except Exception as error:
            self.check(isinstance(error, kind), f"{what}: {type(error).__name__}: {error}")


def state(model: nn.Module) -> dict[str, Any]:
    """All of a model that an error may not disturb, its choice and torch's generator with it."""
    hosts = [module.peftlite for module in model.modules() if isinstance(module, host.Host)]
    registries = [hosted.registry for hosted in hosts if hosted.registry is not None]
    return {
        **digest(model),
        "generator": bits(torch.get_rng_state()),
        "choices": [hosted.choice.__dict__.copy() for hosted in hosts],
        "groups": [
            (name, {slot: [*map(id, patches)] for slot, patches in group.by_slot.items()})
            for hosted in hosts
            for name, group in hosted._modules.items()
        ],
        "deltas": [list(registry.deltas.items()) for registry in registries],
        "merged": [list(registry.merged) for registry in registries],
        "marks": [delta.merged for delta in pl.deltas(model).values()],
        "kept": [list(registry.originals) for registry in registries],
        "thawed": [registry.thawed for registry in registries],
    }


def difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The first thing that differs, in words; nothing if none does."""
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if not keys and list(before) != list(after):
        return "the order of its modules"
    return ", ".join(map(str, keys[:3]))
