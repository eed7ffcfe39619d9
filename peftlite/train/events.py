"""Events: what happens while training, to a file, a progress bar, and whoever wants to know."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from peftlite.io.files import replacing, writing_to
from peftlite.progress import bar
from peftlite.train.history import FIELDS, Event, History
from peftlite.train.measure import Metrics
from peftlite.train.settings import Training
from peftlite.train.state import fork_rng


class Callback(Protocol):
    """Three methods that are called while a model trains.

    What they draw at random doesn't change the training. `trainer.stop()` ends it after the step
    at hand; the trainer that is given is the `pl.Trainer` itself.
    """

    def start(self, trainer: Training, history: History) -> None:
        """Before the first step, or the first after a resume; `history` has what was before."""

    def event(self, event: Event) -> None:
        """After every step, in order; on a GPU several at a time, since asking makes it wait."""

    def end(self, history: History) -> None:
        """After the last step, and if training fails."""


class Log:
    """The events of a run: to memory, to a JSONL file if there is one, and to callbacks.

    Values may be tensors, and metrics by prefix: they are fetched when the log is flushed.
    """

    history: History
    path: Path | None
    callbacks: Sequence[Callback]

    def __init__(
        self, path: Path | None, callbacks: Sequence[Callback], device: torch.device
    ) -> None:
        self.history, self.path, self.callbacks = History(), path, callbacks
        self.device = device
        self._pending: list[tuple[Event, dict[str, Metrics]]] = []
        self._file: IO[str] | None = None

    @contextmanager
    def opened(self, trainer: Training, step: int) -> Iterator[None]:
        """The file is open and the callbacks started, for events after a step."""
        started: list[Callback] = []
        try:
            self._open(step)
            with fork_rng(self.device):
                for callback in self.callbacks:
                    callback.start(trainer, self.history)
                    started.append(callback)
            yield
        finally:
            for callback in started:
                callback.end(self.history)
            if self._file is not None:
                with suppress(OSError):  # what isn't there by now was told of
                    self._file.close()

    def _open(self, step: int) -> None:
        """Opens the file to go on after a step: its events up to there stay, later ones go."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_bytes().splitlines(True) if step and self.path.exists() else []
        self.history.events = [e for e in map(_event, lines) if e.get("step", math.inf) <= step]
        with replacing(self.path) as file:
            file.writelines(_line(event).encode() for event in self.history.events)
        with writing_to(self.path):
            self._file = self.path.open("a")

    def add(self, event: Event, metrics: dict[str, Metrics]) -> None:
        """Takes up an event, to be fetched and passed on when the log is flushed."""
        self._pending.append((event, metrics))

    def drop(self) -> None:
        """Forgets the events that weren't flushed."""
        self._pending.clear()

    def flush(self, **more: Any) -> None:
        """Fetches the pending events, adds `more`, and passes them on. The host waits here."""
        pending, self._pending = self._pending, []
        for values, metrics in pending:
            means: Event = {}
            for prefix, each in metrics.items():
                means |= each.means(prefix)
            event = {**dict.fromkeys(FIELDS), **values, **means, **more}
            event = {key: _plain(value) for key, value in event.items()}
            self.history.events.append(event)
            self._to_file(lambda file, event=event: file.write(_line(event)))
            if self.callbacks:
                with fork_rng(self.device):
                    for callback in self.callbacks:
                        callback.event(event)
        self._to_file(lambda file: file.flush())

    def sync(self) -> None:
        """Makes flushed events outlast a power cut."""
        self._to_file(lambda file: os.fsync(file.fileno()))

    def _to_file(self, act: Callable[[IO[str]], Any]) -> None:
        """Does something to the file, if there is one. Raises FileError."""
        if self._file is not None and self.path is not None:
            with writing_to(self.path):
                act(self._file)


def _line(event: Event) -> str:
    return json.dumps(event) + "\n"


def _event(line: bytes) -> Event:
    """The event of a line; an empty one if the line was torn."""
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return {}


def _plain(value: Any) -> Any:
    """A value as JSON holds it; a number that isn't finite is None."""
    value = value.item() if isinstance(value, Tensor) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress(Callback):
    """A progress bar; in a file, a line every so often."""

    bar: Any

    def start(self, trainer: Training, history: History) -> None:
        done = history.events[-1]["step"] if history.events else 0
        self.bar = bar(None, "train", total=trainer.total_steps, initial=done, unit="step")

    def event(self, event: Event) -> None:
        shown = {"loss": "train_loss", "valid": "full_valid_loss"}
        known = {k: f"{event[v]:.4g}" for k, v in shown.items() if event[v] is not None}
        self.bar.set_postfix(known, refresh=False)
        self.bar.update(event["step"] - self.bar.n)

    def end(self, history: History) -> None:
        self.bar.close()


class TensorBoard(Callback):
    """Scalars for TensorBoard, in a folder; needs the package tensorboard.

    Args:
        folder: to write them to.
    """

    writer: Any

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = folder

    def start(self, trainer: Training, history: History) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(os.fspath(self.folder))

    def event(self, event: Event) -> None:
        for name, value in _scalars(event).items():
            self.writer.add_scalar(name, value, event["step"])

    def end(self, history: History) -> None:
        self.writer.close()


class WandB(Callback):
    """Scalars for Weights & Biases; needs the package wandb.

    Args:
        options: of `wandb.init`.
    """

    run: Any

    def __init__(self, **options: Any) -> None:
        self.options = options

    def start(self, trainer: Training, history: History) -> None:
        import wandb  # type: ignore

        self.run = wandb.init(**{"config": trainer.settings(), **self.options})

    def event(self, event: Event) -> None:
        self.run.log(_scalars(event), step=event["step"])

    def end(self, history: History) -> None:
        self.run.finish()


def _scalars(event: Event) -> dict[str, float]:
    counters = ("step", "total_steps")
    return {k: v for k, v in event.items() if v is not None and k not in counters}
