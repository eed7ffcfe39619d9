"""Moving: a reference that follows the policy, π₀ ← απ + (1 − α)π₀, by `combine`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftlite.core.attach import detach
from peftlite.core.delta import Registry
from peftlite.core.find import require
from peftlite.errors import PeftliteError
from peftlite.fields import check_fields, integer, number
from peftlite.io.load import load
from peftlite.io.native import save
from peftlite.spelling import Spelled
from peftlite.table import listed, short
from peftlite.train.preference.losses import dpo, kto
from peftlite.train.preference.told import current
from peftlite.verbs.combine import combine
from peftlite.verbs.use import use


@dataclass(eq=False)
class moving(Spelled):
    """A loss whose reference follows the policy: W₀ ← αW + (1 − α)W₀ after every so many steps

    TR-DPO, Gorbatovski et al., arXiv:2404.09656, §3: α = 1 is its hard update, less a soft one. The
    reference begins as the loss has it; from the first move on it is a frozen delta of its own,
    which `pl.combine` makes by what the policy does to the weights, and which stays attached.

    Args:
        loss: `pl.losses.dpo(...)` or `pl.losses.kto(...)`.
        alpha: α, above 0.
        every: steps of the optimizer from one move to the next.
        name: of the delta that is the reference.

    Raises:
        PeftliteError: a setting isn't one of these; at a call, the reference's log-probabilities
            are kept, or the name is another delta's; at a move, several deltas are the policy, or
            it changes calls and not weights.

    Example:
        pairs = pl.data.preference([{"prompt": "1 + 2 = ", "chosen": "3", "rejected": "4"}] * 4)
        model = nn.Sequential(nn.Embedding(264, 4), nn.Linear(4, 4), nn.Linear(4, 264))
        pl.attach(model, pl.LoRA(rank=2), name="polite")
        loss = pl.losses.moving(pl.losses.dpo(), alpha=0.6, every=2)
        pl.Trainer(model, loss, pairs, epochs=2, batch_size=2, lr=1e-3, progress=False).fit()
    """

    loss: dpo | kto
    alpha: float = number(0.6, float, lambda x: 0 < x <= 1, "above 0 and at most 1")
    every: int = integer(512)
    name: str = "reference"

    steps: int = field(default=0, init=False)
    file: Tensor | None = field(default=None, init=False)  # the bytes of the reference's own file
    stale: bool = field(default=False, init=False)  # whether the model has another than that

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.loss, dpo | kto):
            raise PeftliteError(
                f"the reference that moves is that of pl.losses.dpo or kto, not {short(self.loss)}"
            )

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        """What the loss gives, by the reference as it is now. Raises PeftliteError."""
        if isinstance(batch, Mapping) and "reference" in batch:
            raise PeftliteError(
                "the batch has its reference's log-probabilities kept, and a reference that moves "
                "has others: give the data as it was before pl.keep_reference"
            )
        self._settle(model)
        return replace(self.loss, reference=self._now)(model, batch)

    def after_step(self, model: nn.Module) -> None:
        """Moves the reference, when it is time. Raises PeftliteError unless one delta is chosen."""
        self.steps += 1
        if self.steps % self.every == 0:
            self._settle(model)
            self._move(*require(model))

    def state_dict(self) -> dict[str, Any]:
        """How many steps there were, and the reference as a file."""
        return {"steps": self.steps, "file": self.file}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on, or back, to a state: to the bit, in the next call."""
        self.steps, self.file, self.stale = state["steps"], state["file"], True

    @property
    def _now(self) -> Any:
        return self.loss.reference if self.file is None else self.name

    def _move(self, root: nn.Module, registry: Registry) -> None:
        names, old = current(root), self._now
        if len(names) != 1:
            raise PeftliteError(
                f"the reference follows one delta, and {listed(map(repr, names)) or 'none'} is "
                "chosen: pl.combine them first"
            )
        weights = {names[0]: self.alpha}
        if old is not None and self.alpha < 1:
            weights[old] = weights.get(old, 0.0) + 1 - self.alpha
        new = f"{self.name}-moved"
        combine(root, weights, name=new)
        if self.name in registry.deltas:
            detach(root, self.name)
        self.file = _bytes_of(combine(root, {new: 1.0}, name=self.name))
        detach(root, new)
        use(root, names)

    def _settle(self, model: nn.Module) -> None:
        """The model has the reference that this has."""
        root, registry = require(model)
        there = self.name in registry.deltas
        if there and self.file is None and not self.stale:
            raise PeftliteError(
                f"a delta named {self.name!r} is attached already: choose another name= for the "
                "reference, or detach it; what it begins as, the loss has: dpo(reference=...)"
            )
        if not self.stale:
            return
        names = registry.choice.standing
        if there:
            detach(root, self.name)
        if self.file is not None:
            with TemporaryDirectory() as folder:
                path = Path(folder) / "reference.safetensors"
                path.write_bytes(self.file.cpu().numpy().tobytes())
                load(root, path, name=self.name)
        use(root, names)
        self.stale = False


def _bytes_of(delta: Any) -> Tensor:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "reference.safetensors"
        save(delta, path, base="sampled")
        return torch.from_numpy(np.frombuffer(path.read_bytes(), np.uint8).copy())
