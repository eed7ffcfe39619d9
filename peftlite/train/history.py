"""History: the events of a training run, as a table, a CSV file and a plot."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftlite.table import Shown, format_cell, table

Event = dict[str, Any]

FIELDS = (
    "step", "total_steps", "epoch", "train_loss", "valid_loss", "full_valid_loss",
    "train_mean_token_accuracy", "valid_mean_token_accuracy", "full_valid_mean_token_accuracy",
    "full_valid_perplexity", "lr", "grad_norm", "tokens_per_second", "memory",
)  # fmt: skip
"""The fields of every event, None where one doesn't apply; probes and a loss's own follow."""


@dataclass(repr=False)
class History(Shown):
    """The events of a run, one a step, the first (step 0) from before training.

    Attributes:
        events: dicts of FIELDS and more: a probe's score by its name, and how much of it was lost
            since before training as `… forgotten`. `memory` is the most bytes held so far: on the
            device, or by the process where that is the CPU.
        stopped: why it ended: "done", "early" (no better for `patience` epochs), "asked", or
            "failed", where others that trained with it went on.
        best: the checkpoint of the best epoch, a folder; None without one.
        error: of one that failed.
    """

    events: list[Event] = field(default_factory=list)
    stopped: str = ""
    best: Path | None = None
    error: BaseException | None = None

    @property
    def epochs(self) -> list[Event]:
        """The events of whole epochs, each with the mean `train_loss` since the one before."""
        rows: list[Event] = []
        since: list[float] = []
        for event in self.events:
            since += [event["train_loss"]] if event["train_loss"] is not None else []
            if event["step"] == 0 or event["epoch"] == int(event["epoch"]):
                rows.append({**event, "train_loss": sum(since) / len(since) if since else None})
                since = []
        return rows

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes all events to a CSV file, one a row."""
        import csv

        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, _columns(self.events), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.events)

    @property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Each loss, accuracy and probe that was measured, by name, as points (step, value)."""
        names = [
            name for name in _columns(self.events)
            if name.endswith(("_loss", "_accuracy"))
            or not (name in FIELDS or name.endswith(" forgotten"))
        ]  # fmt: skip
        points = {
            name: [(e["step"], e[name]) for e in self.events if e.get(name) is not None]
            for name in names
        }
        return {name: each for name, each in points.items() if each}

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """The figure of `pl.plot.history`.

        Args:
            path: to write it to, in the format of its ending.
        """
        from peftlite.plot import history

        figure = history(self).figure
        if path is not None:
            figure.savefig(path)
        return figure

    def _summary(self) -> str:
        step, epoch = (
            (self.events[-1][name] for name in ("step", "epoch")) if self.events else (0, 0)
        )
        return f"{step} steps, {epoch:g} epochs, {self.stopped or 'not ended'}"

    def _lines(self) -> Iterator[str]:
        rows = self.epochs
        hidden = {"total_steps", "valid_loss", "valid_mean_token_accuracy", "grad_norm", "memory"}
        shown = [
            name for name in _columns(rows)
            if name not in hidden and any(row.get(name) is not None for row in rows)
        ]  # fmt: skip
        titles = [name.replace("full_valid", "valid").replace("_", " ") for name in shown]
        yield table(titles, [[format_cell(row.get(name)) for name in shown] for row in rows])


def _columns(events: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys([*FIELDS, *(name for event in events for name in event)]))
