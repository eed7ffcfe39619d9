"""The sweep: for every method and task a learning rate is sought, then the seeds that count run.

Each finished run is a line of the record, and isn't run again.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from peftlite.errors import PeftliteError

from .methods import Row
from .run import Outcome, run
from .task import Task

TRIES = 4  # of learning rates, for every method alike
MOST = 8  # of them, as long as the best lies at an end of what was tried
SEEDS = (1, 2, 3, 4, 5)  # with the rate that was found; it's sought with seed 0

Line = dict[str, str]

ABOUT = ("commit", "cpu")
COLUMNS = ("task", "base", "method", "key", "rate", "seed")
COLUMNS += (*(f.name for f in fields(Outcome)), *ABOUT)


class Record:
    """The runs so far, kept in a CSV file if there is one; `about` says of each where it ran."""

    def __init__(self, path: Path | None, about: Mapping[str, str]) -> None:
        self.path, self.about = path, {name: about[name] for name in ABOUT}
        self.lines: list[Line] = []
        if path and path.exists():
            with path.open(newline="") as file:
                self.lines = list(csv.DictReader(file))

    def find(self, **cells: object) -> list[Line]:
        want = {key: str(cell) for key, cell in cells.items()}
        return [line for line in self.lines if want.items() <= line.items()]

    def add(self, **cells: object) -> None:
        line = {key: str(cell) for key, cell in cells.items()} | self.about
        self.lines.append(line)
        if self.path:
            fresh = not self.path.exists()
            with self.path.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if fresh:
                    writer.writeheader()
                writer.writerow(line)


def sweep(task: Task, row: Row, record: Record, seeds: Sequence[int] = SEEDS) -> None:
    """Adds to the record what it lacks of one method on one task."""
    run_of = {"task": task.name, "base": task.begins, "method": row.name, "key": row.key(task)}

    def validation(rate: float, seed: int = 0, final: bool = False) -> float:
        cells = {**run_of, "rate": rate, "seed": seed}
        if not record.find(**cells, error=""):
            record.add(**cells, **asdict(run(task.drawn(seed), row, rate, seed, final)))
        return float(record.find(**cells, error="")[0]["validation"])

    try:
        rate = seek(validation, task.rate) if row.trains else 0.0
        for seed in seeds if row.trains else seeds[:1]:
            validation(rate, seed, final=True)
    except PeftliteError as error:
        outcome = asdict(Outcome(error=str(error)))
        if not record.find(**run_of, error=error):
            record.add(**run_of, rate=0.0, seed=0, **outcome)


def seek(loss: Callable[[float], float], start: float) -> float:
    """The best of `TRIES` rates; of up to `MOST` while the best lies at an end.

    The first two are `start` and four times that; each further one lies beyond the best so far, at
    a factor of four, and between it and the better of its neighbours when both of them are known.
    """
    losses: dict[int, float] = {}  # by the rate's binary logarithm, `start` being 0
    while len(losses) < TRIES or (_best(losses) in _ends(losses) and len(losses) < MOST):
        step = _next(losses)
        found = loss(start * 2.0**step)
        losses[step] = math.inf if math.isnan(found) else found
    return start * 2.0 ** _best(losses)


def _best(losses: dict[int, float]) -> int:
    return min(losses, key=losses.__getitem__)


def _ends(losses: dict[int, float]) -> tuple[int, int]:
    return min(losses), max(losses)


def _next(losses: dict[int, float]) -> int:
    if len(losses) < 2:
        return 2 * len(losses)
    best = _best(losses)
    neighbours = best - 2, best + 2
    unknown = [step for step in neighbours if step not in losses]
    return unknown[0] if unknown else (best + min(neighbours, key=losses.__getitem__)) // 2
