"""Draft: a delta, as far as it is put into peft's words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import Tensor

from peftlite.core.assign import Placed
from peftlite.core.delta import Delta
from peftlite.core.merged import base_tensor
from peftlite.core.patch import apply
from peftlite.core.site import whole_address
from peftlite.io.peft.folder import PROMPTS, START, WRAPPED
from peftlite.io.peft.form import Form
from peftlite.io.peft.forms import FORMS
from peftlite.io.refusal import refusal


@dataclass
class Draft:
    """A delta, as far as it is put into peft's words.

    Args:
        delta: all of it.
        kind: peft's name of its method.
        task: peft's name of the task, if it's known.
        config: peft's settings.
        tensors: by peft's keys.
        layers: how many layers peft puts around a module for its parameters, by path.
        targets: the paths of the modules that a method has tensors of.
    """

    delta: Delta
    kind: str
    task: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    layers: Counter[str] = field(default_factory=Counter)
    targets: set[str] = field(default_factory=set)

    @property
    def form(self) -> Form | None:
        return FORMS.get(self.kind)

    def key(self, path: str) -> str:
        """What a path in the model is in peft's."""
        for outer, layers in self.layers.items():
            if path.startswith(f"{outer}.") and not path.startswith(f"{outer}.base_layer"):
                path = outer + ".base_layer" * layers + path.removeprefix(outer)
        return (WRAPPED if self.kind in PROMPTS else START) + path

    def value(self, item: Placed) -> Tensor:
        """A whole tensor with the delta in it, and nothing else."""
        address, w = whole_address(item.site.address), item.site.whole
        if self.delta.merged_in is not None:
            w = base_tensor(self.delta.merged_in, item.site, but=self.delta)
        placed = self.delta.placed.items()
        return apply([own.patch for a, own in placed if whole_address(a) == address], w)


def refuse(item: Placed, why: str) -> NoReturn:
    """Raises PeftliteError, since a site can't be in a directory of peft's."""
    raise refusal(item, "a PEFT directory", why)


def module_of(item: Placed) -> str:
    """The path of the module whose tensor is changed."""
    return whole_address(item.site.address).rpartition(".")[0]
