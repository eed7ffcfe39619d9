"""Events: what happens while training, to a file, a progress bar, and whoever wants to know."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from peftlite.io.files import replacing
from peftlite.train.history import FIELDS, Event, History
from peftlite.train.measure import Tally
from peftlite.train.state import random_kept

if TYPE_CHECKING:
    from peftlite.train.trainer import Trainer


class Callback(Protocol):
    """Whoever wants to know: three methods. What they draw at random doesn't change the training.

    `trainer.stop()` ends training after the step at hand.
    """

    def start(self, trainer: Trainer, history: History) -> None:
        """Before the first step, or the first after a resume; `history` has what was before."""

    def event(self, event: Event) -> None:
        """After every step, in order; on a GPU several at a time, since asking makes it wait."""

    def end(self, history: History) -> None:
        """After the last step, and if training fails."""


class Log:
    """The events of a run: to memory, to a JSONL file if there is one, and to callbacks.

    Values may be tensors, and tallies by prefix; they are fetched when it is flushed.
    """

    def __init__(
        self, path: Path | None, callbacks: Sequence[Callback], device: torch.device
    ) -> None:
        self.history, self.path, self.callbacks = History(), path, callbacks
        self.device = device
        self._pending: list[tuple[Event, dict[str, Tally]]] = []
        self._file = None

    @contextmanager
    def told(self, trainer: Trainer, step: int) -> Iterator[None]:
        """What happens inside is told, from a step on."""
        begun: list[Callback] = []
        try:
            self._open(step)
            with random_kept(self.device):
                for callback in self.callbacks:
                    callback.start(trainer, self.history)
                    begun.append(callback)
            yield
        finally:
            for callback in begun:
                callback.end(self.history)
            if self._file is not None:
                self._file.close()

    def _open(self, step: int) -> None:
        """Takes up what the file has up to a step; what came after is forgotten."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_bytes().splitlines(True) if step and self.path.exists() else []
        self.history.events = [e for e in map(_event, lines) if e.get("step", math.inf) <= step]
        with replacing(self.path) as file:
            file.writelines(_line(event).encode() for event in self.history.events)
        self._file = self.path.open("a")

    def add(self, event: Event, tallies: dict[str, Tally]) -> None:
        self._pending.append((event, tallies))

    def drop(self) -> None:
        """Forgets what wasn't flushed."""
        self._pending.clear()

    def flush(self, **more: Any) -> None:
        """Fetches what is pending, adds `more`, and tells of it. The device is waited for."""
        pending, self._pending = self._pending, []
        for values, tallies in pending:
            means = {
                k: v for prefix, each in tallies.items() for k, v in each.means(prefix).items()
            }
            event = {**dict.fromkeys(FIELDS), **values, **means, **more}
            event = {key: _plain(value) for key, value in event.items()}
            self.history.events.append(event)
            if self._file is not None:
                self._file.write(_line(event))
            if self.callbacks:
                with random_kept(self.device):
                    for callback in self.callbacks:
                        callback.event(event)
        if self._file is not None:
            self._file.flush()

    def sync(self) -> None:
        """Makes what was flushed last."""
        if self._file is not None:
            os.fsync(self._file.fileno())


def _line(event: Event) -> str:
    return json.dumps(event) + "\n"


def _event(line: bytes) -> Event:
    """What a line says; nothing if it was torn."""
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return {}


def _plain(value: Any) -> Any:
    """A value that JSON holds; a number that isn't finite is none."""
    value = value.item() if isinstance(value, Tensor) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
    """A progress bar, in a terminal or a notebook."""

    def start(self, trainer: Trainer, history: History) -> None:
        from tqdm.auto import tqdm

        done = history.events[-1]["step"] if history.events else 0
        self.bar = tqdm(total=trainer.total_steps, initial=done, desc="train", unit="step")

    def event(self, event: Event) -> None:
        shown = {"loss": "train_loss", "valid": "full_valid_loss"}
        known = {k: f"{event[v]:.4g}" for k, v in shown.items() if event[v] is not None}
        self.bar.set_postfix(known, refresh=False)
        self.bar.update(event["step"] - self.bar.n)

    def end(self, history: History) -> None:
        self.bar.close()


class TensorBoard:
    """Scalars for TensorBoard, in a folder; needs the package tensorboard."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = folder

    def start(self, trainer: Trainer, history: History) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(os.fspath(self.folder))

    def event(self, event: Event) -> None:
        for name, value in _scalars(event).items():
            self.writer.add_scalar(name, value, event["step"])

    def end(self, history: History) -> None:
        self.writer.close()


class WandB:
    """Scalars for Weights & Biases; needs the package wandb. `options` are of `wandb.init`."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def start(self, trainer: Trainer, history: History) -> None:
        import wandb  # type: ignore

        self.run = wandb.init(**{"config": trainer.settings(), **self.options})

    def event(self, event: Event) -> None:
        self.run.log(_scalars(event), step=event["step"])

    def end(self, history: History) -> None:
        self.run.finish()


def _scalars(event: Event) -> dict[str, float]:
    counters = ("step", "total_steps")
    return {k: v for k, v in event.items() if v is not None and k not in counters}
