"""Trials: a search over learning rate, rank, method and the rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from peftlite.core.attach import detach
from peftlite.errors import PeftliteError
from peftlite.table import Shown, Table, format_cell, listed, short, table
from peftlite.train.events import Callback
from peftlite.train.halving import Halving
from peftlite.train.history import Event, History
from peftlite.train.measure import best_of
from peftlite.train.parallel import Processes, process_group
from peftlite.train.settings import Training
from peftlite.train.space import Choice, How, Space, choose, count_trials, restored
from peftlite.train.state import fork_rng
from peftlite.train.study import Study, plain
from peftlite.train.together.jobs import Job, train
from peftlite.train.trainer import Trainer

STARTUP = 4
"""Trials that are seen to the end before one is stopped for being worse than they were."""


@dataclass(repr=False)
class Trial(Shown):
    """One choice, and how it went.

    Attributes:
        number: of the trial, from 1.
        values: of the metric, after each epoch.
        state: "done"; "pruned", stopped for being worse than others; or "failed", of `error`.
    """

    number: int
    choice: Choice
    metric: str = ""
    values: list[float] = field(default_factory=list)
    state: str = "done"
    error: str = ""

    @property
    def value(self) -> float | None:
        """The best of the values, by which the trial is judged; None if there is none."""
        return best_of(self.metric)(self.values, default=None)

    @property
    def row(self) -> dict[str, Any]:
        """Its cells in a table, by column."""
        result = {self.metric or "value": self.value, "epochs": len(self.values)}
        return {
            "trial": self.number, **plain(self.choice), **result,
            "state": self.state, "error": self.error,
        }  # fmt: skip

    def _summary(self) -> str:
        return f"{self.number}: {_outcome(self)}"

    def _lines(self) -> Iterator[str]:
        yield _table([self.row])


@dataclass(repr=False)
class Trials(Shown):
    """The trials of a search, in order; it prints as a table."""

    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> Trial:
        """The best trial that was seen to the end. Raises PeftliteError if there is none."""
        done = [trial for trial in self.trials if trial.state == "done"]
        if not done:
            errors = listed(f"trial {trial.number}: {trial.error}" for trial in self.trials)
            raise PeftliteError(f"no trial came to an end: {errors}")
        return best_of(done[0].metric)(done, key=lambda trial: trial.value)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The cells of each trial in the table, by column."""
        metric = next((trial.metric for trial in self.trials if trial.metric), "")
        return (replace(trial, metric=metric).row for trial in self.trials)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the trials to a CSV file, one a row."""
        import csv

        with open(path, "w", newline="") as file:
            rows = [*self.rows()]
            writer = csv.DictWriter(file, (rows or [{"trial": 1}])[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def _summary(self) -> str:
        done = sum(trial.state == "done" for trial in self.trials)
        return f"{len(self.trials)} trials, {done} done"

    def _lines(self) -> Iterator[str]:
        yield _table([*self.rows()])


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    header = [*(rows or [{"trial": 1}])[0]]
    return table(header, [[format_cell(cell) for cell in row.values()] for row in rows])


def search(
    build: Callable[[Choice], Trainer],
    space: Space,
    trials: int | None = None,
    how: How = "random",
    *,
    seed: int = 0,
    prune: bool = True,
    together: int = 1,
    file: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Trials:
    """Trains once for each of many choices: trials, judged by the Trainer's metric.

    A trial follows from its choice and the seed alone. After each, the deltas that it trained are
    detached, so that `build` may attach to one base again and again. A trial whose training fails
    with a PeftliteError, such as for a loss that isn't finite, is noted, and the next begins.

    Args:
        build: makes a `Trainer` of a choice, `{"lr": 2e-3, "rank": 8}`, judged at its best epoch.
            With a `folder` of its own, a trial that was interrupted goes on from its checkpoints.
        space: values to choose from, by name: a list of anything; `(low, high)`, floats or whole
            numbers, both included; or `(low, high, "log")`, the same by ratios.
        trials: how many; None, for a grid, is all of it.
        how: "grid" takes combinations of lists in order, the last name varying fastest; "random"
            draws (Bergstra and Bengio, JMLR 13, 2012); "bayes" learns from the trials before, by
            the tree-structured Parzen estimators of optuna (Bergstra et al., NeurIPS 2011).
        seed: of the choices, and of the numbers that `build` draws, the same for every trial.
        prune: stop a trial whose best so far is worse than the median of the others' at that epoch
            (Golovin et al., KDD 2017, §3.2.2); together, most after 1/16 and 5/8 of the training.
        together: how many trials train at a time on the base that `build` attaches their deltas
            to, by `pl.fit_together`.
        file: JSONL to keep the trials that are over; a search that finds it goes on after them.
        progress: print a line for each trial.

    Raises:
        PeftliteError: an argument isn't of these, optuna isn't installed, or `build` raises it.
        FileError: the file is of another search.

    Example:
        model, data = nn.Linear(4, 3), [(torch.randn(4), i % 3) for i in range(30)]
        loss, options = pl.losses.classification, {"epochs": 1, "progress": False}
        def build(choice):
            pl.attach(model, pl.LoRA(rank=choice["rank"], targets="weight"), name="trial")
            return pl.Trainer(model, loss, data[6:], data[:6], **options)
        print(pl.search(build, {"rank": [1, 2]}, how="grid").best.choice)
    """
    count = count_trials(space, how, trials, together)
    about = {"how": how, "seed": seed, "prune": prune, "space": plain(dict(space))}
    with process_group("auto") as processes:
        study = Study(file if processes.first else None, about)
        with study.opened() as own:
            lines = processes.broadcast(own)[:count]
            found = [Trial(**{**line, "choice": restored(space, line["choice"])}) for line in lines]
            while len(found) < count:
                new = _begun(space, how, found, seed, min(together, count - len(found)))
                _try(build, new, found if prune else None, seed)
                _note(new, study, processes, count if progress else 0)
                found += new
    return Trials(found)


def _begun(space: Space, how: How, found: Sequence[Trial], seed: int, count: int) -> list[Trial]:
    """The next trials, with their choices."""
    every = [*found]
    for _ in range(count):
        every.append(Trial(len(every) + 1, _choose(space, how, every, seed)))
    return every[len(found) :]


def _choose(space: Space, how: How, found: Sequence[Trial], seed: int) -> Choice:
    tried = [(trial.choice, trial.value) for trial in found]
    return choose(space, how, tried, any(best_of(t.metric) is min for t in found), seed)


def _result(trial: Trial) -> dict[str, Any]:
    """A trial's fields, but for its choice: the first process has them, where callbacks run."""
    return {name: value for name, value in vars(trial).items() if name != "choice"}


def _try(
    build: Callable[[Choice], Trainer],
    trials: Sequence[Trial],
    before: Sequence[Trial] | None,
    seed: int,
) -> None:
    """Trains the next trials; those before them prune, unless there is to be no pruning."""
    if len(trials) > 1:
        _run_together(build, trials, before is not None, seed)
    else:
        _run(build, trials[0], before or [], seed)


def _run(
    build: Callable[[Choice], Trainer], trial: Trial, others: Sequence[Trial], seed: int
) -> None:
    """Trains, and leaves nothing behind but the trial's fields."""
    trainer = _built(build, trial, seed)
    trainer.callbacks = [*trainer.callbacks, _Pruner(trial, others)]
    with ExitStack() as stack:
        for delta in trainer.deltas:
            stack.callback(detach, trainer.model, delta)
        _check_metric(trainer)
        try:
            trainer.fit(resume=trainer.folder is not None)
        except PeftliteError as error:
            trial.state, trial.error = "failed", str(error)
    _check_values(trial)


def _run_together(
    build: Callable[[Choice], Trainer], trials: Sequence[Trial], prune: bool, seed: int
) -> None:
    """The same, for several whose rows are one batch."""
    jobs: list[Job] = []
    for trial in trials:
        trainer = _built(build, trial, seed)
        jobs.append(Job.of(trainer, trainer.folder is not None))
        detach(trainer.model, jobs[-1].delta)  # the next one may have its name
        _check_metric(trainer)
    halving = Halving(trials[0].metric)
    for trial, job in zip(trials, jobs, strict=True):
        job.trainer.callbacks = [*job.trainer.callbacks, _Noter(trial)]
        job.contender = halving.contender(job.trainer.stop) if prune else None
    train(jobs, None, progress=False)
    for trial, job in zip(trials, jobs, strict=True):
        if job.contender is not None and job.contender.is_out:
            trial.state = "pruned"
        try:
            job.done.result()
        except PeftliteError as error:
            trial.state, trial.error = "failed", str(error)
        _check_values(trial)


def _built(build: Callable[[Choice], Trainer], trial: Trial, seed: int) -> Trainer:
    with fork_rng(torch.device("cpu"), seed):
        trainer = build(dict(trial.choice))
    if not isinstance(trainer, Trainer):
        raise PeftliteError(f"build makes a pl.Trainer of a choice, not {short(trainer)}")
    trial.metric = trainer.metric
    return trainer


def _check_metric(trainer: Trainer) -> None:
    if trainer.val is None and trainer.metric.startswith("full_valid"):
        raise PeftliteError(
            f"a search goes by {trainer.metric}: give the Trainer val, or another metric"
        )


def _check_values(trial: Trial) -> None:
    if trial.state == "done" and not trial.values:
        trial.state, trial.error = "failed", f"no epoch has a finite {trial.metric}"


@dataclass
class _Noter(Callback):
    """A callback: notes the metric after each epoch."""

    trial: Trial

    def start(self, trainer: Training, history: History) -> None:
        self.trainer, self.ended = trainer, False
        for event in history.events:
            self.event(event)

    def event(self, event: Event) -> None:
        value = event.get(self.trial.metric)
        if value is None or not event["step"] or event["epoch"] != int(event["epoch"]):
            return
        self.trial.values.append(value)
        self.ended = event["step"] == event["total_steps"]
        self.judge()

    def end(self, history: History) -> None:
        self.ended = True

    def judge(self) -> None:
        """Looks at what was noted."""


@dataclass
class _Pruner(_Noter):
    """Stops a trial that is worse than the median of others."""

    others: Sequence[Trial]

    def judge(self) -> None:
        if not self.ended and self._is_worse():
            self.trial.state = "pruned"
            self.trainer.stop()

    def _is_worse(self) -> bool:
        best, epochs = best_of(self.trial.metric), len(self.trial.values)
        theirs = [best(t.values[:epochs]) for t in self.others if t.state == "done"]
        if len(theirs) < STARTUP:
            return False
        own, median = best(self.trial.values), float(np.median(theirs))
        return own != median and best(own, median) == median


def _note(trials: Sequence[Trial], study: Study, processes: Processes, shown_of: int) -> None:
    """Keeps how trials went, as the first process has it, and prints it."""
    for trial in trials:
        vars(trial).update(processes.broadcast(_result(trial)))
        study.add(vars(trial))
        if shown_of and processes.first:
            print(_line(trial, shown_of))


def _line(trial: Trial, count: int) -> str:
    return f"trial {trial.number} of {count}: {_outcome(trial)}"


def _outcome(trial: Trial) -> str:
    choice = ", ".join(f"{name}={format_cell(each)}" for name, each in plain(trial.choice).items())
    outcome = trial.error or f"{trial.metric} {format_cell(trial.value)}"
    return f"{choice}: {outcome}, {trial.state}"
