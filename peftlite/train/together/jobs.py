"""Jobs: trainers that share one base, each with a delta, data and settings of its own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from torch import nn

from peftlite.bank.bank import DeltaBank
from peftlite.core.delta import Delta
from peftlite.core.find import find, require
from peftlite.errors import PeftliteError
from peftlite.methods.low_rank import LowRankPatch
from peftlite.progress import bar
from peftlite.table import listed, short
from peftlite.train.data.checks import check_counts
from peftlite.train.events import Callback
from peftlite.train.halving import Contender
from peftlite.train.history import Event, History
from peftlite.train.parallel import Processes, check_unsharded, process_group
from peftlite.train.settings import Settings, Training
from peftlite.train.state import fork_rng
from peftlite.train.together.batcher import Batcher, Shared
from peftlite.train.together.caller import Caller
from peftlite.train.trainer import Resume, Trainer
from peftlite.verbs.use import use


@dataclass(eq=False)
class Job(Callback):
    """A trainer, what is found of it before the model is the bank's, and how it goes."""

    trainer: Trainer
    delta: Delta
    settings: Settings
    resume: Resume = False
    contender: Contender | None = None
    history: History = field(default_factory=History)
    bar: Any = None
    done: Future[History] = field(default_factory=Future)

    @classmethod
    def of(cls, trainer: Any, resume: Resume) -> Job:
        """Raises PeftliteError unless it can share a base."""
        if not isinstance(trainer, Trainer):
            raise PeftliteError(f"fit_together takes trainers, not {short(trainer)}")
        with _chosen(trainer):
            deltas, settings = trainer.deltas, trainer._decided()
        if len(deltas) > 1:
            names = listed(repr(delta.name) for delta in deltas)
            raise PeftliteError(f"a trainer that shares a base trains one delta, not {names}")
        return cls(trainer, deltas[0], settings, resume)

    def work(self, shared: Shared, processes: Processes) -> History:
        """Its whole run."""
        given = [self.delta], self.settings, self.resume, processes, self, self.contender
        return self.trainer._fit_shared(shared, *given)

    def start(self, trainer: Training, history: History) -> None:
        self.history = history

    def event(self, event: Event) -> None:
        self.bar.update(event["step"] > 0)


@contextmanager
def _chosen(trainer: Trainer) -> Iterator[None]:
    """The delta that a trainer names is the model's choice."""
    standing = require(trainer.model)[1].choice.standing
    if trainer.delta is not None:
        use(trainer.model, trainer.delta)
    try:
        yield
    finally:
        use(trainer.model, standing)


def fit_together(
    trainers: Sequence[Trainer],
    *,
    at_once: int | None = None,
    resume: Resume = False,
    progress: bool = True,
) -> list[History]:
    """Trains the deltas of many trainers at once: the rows of all are one batch of one base.

    Each learns what it would by `fit()` alone, to rounding, from its own data, by its own loss,
    rate, schedule and seed, and has its own checkpoints, early stopping and history; only dropout
    draws other numbers. One that fails ends by itself: its history is "failed", with the error, and
    a warning says so. Any loss will do whose calls of the model have a batch and give a row for
    each row of it; calls of one shape run as one, and so do texts of different lengths that come
    with an `attention_mask`. How many run as one is found by the clock: where that gains nothing,
    they take turns. Under `torch.use_deterministic_algorithms(True)` all that fit run as one.

    Args:
        trainers: of one model, each of another delta, which can be mixed by rows: see
            `pl.DeltaBank`. The deltas needn't be chosen.
        at_once: how many train at a time; the others begin as these end. All if None.
        resume: as in `Trainer.fit`.
        progress: show one bar for all, in place of theirs.

    Returns:
        Histories, in the order of the trainers.

    Raises:
        PeftliteError: before anything trains: they share no model or delta, or a delta can't be
            mixed by rows.

    Example:
        model, data = nn.Linear(4, 3), [(torch.randn(4), i % 3) for i in range(30)]
        trainers = []
        for name in ("a", "b"):
            pl.attach(model, pl.LoRA(rank=2, targets="weight"), name=name)
            trainers.append(pl.Trainer(model, pl.losses.classification, data, delta=name, epochs=2))
        print(pl.fit_together(trainers, progress=False)[0])
    """
    if not isinstance(trainers, list | tuple) or not trainers:
        raise PeftliteError(f"fit_together takes a list of trainers, not {short(trainers)}")
    check_counts(at_once=at_once)
    jobs = [Job.of(trainer, resume) for trainer in trainers]
    histories = train(jobs, at_once, progress)
    for job in jobs:
        if (error := job.history.error) is not None:
            message = f"{job.delta.name!r} failed, and the others went on: {error}"
            warnings.warn(message, stacklevel=2)
    return histories


def train(jobs: Sequence[Job], at_once: int | None, progress: bool) -> list[History]:
    """Their histories, in order; those that failed say so. Raises PeftliteError as above."""
    _check(jobs)
    first = jobs[0].trainer
    deltas, most = [job.delta for job in jobs], min(at_once or len(jobs), len(jobs))
    steps = sum(job.settings.steps for job in jobs)
    with ExitStack() as held:
        processes = held.enter_context(process_group(first.parallel))
        _agree(jobs, processes)
        model = held.enter_context(first._prepared(deltas))
        bank = held.enter_context(_bank(first.model, deltas, most))
        device, seed = next(deltas[0].parameters()).device, processes.seed(first.seed)
        held.enter_context(fork_rng(device, seed))
        shows = progress and processes.first
        shown = bar(None, "train", total=steps, unit="step", disable=not shows)
        held.enter_context(closing(shown))
        batcher = Batcher(bank, model, processes)
        names = {f"job-{i}": job for i, job in enumerate(jobs)}

        def callers() -> Iterator[Caller]:
            for name, job in names.items():
                job.bar = shown
                bank.adopt(name, job.delta)
                yield batcher.caller(name, partial(job.work, processes=processes))

        for caller in batcher.run(callers(), most):
            job = names[caller.name]
            job.done = caller.done
            if (error := job.done.exception()) is not None:
                if processes.size > 1 and not isinstance(error, PeftliteError):
                    job.done.result()  # raises, for the others may wait for this process
                job.history.stopped, job.history.error = "failed", error
            bank.evict(caller.name)
            bank.drop(caller.name)
        for job in jobs:
            job.history = processes.broadcast(job.history)
    return [job.history for job in jobs]


def _agree(jobs: Sequence[Job], processes: Processes) -> None:
    """Each process has the first one's deltas. Raises PeftliteError if they differ in more."""
    deltas = [job.delta for job in jobs]
    check_unsharded(deltas)
    for job in jobs:
        given = {f"{key} of {job.delta.name!r}": v for key, v in asdict(job.settings).items()}
        processes.check_same("the settings", given, "give all processes the same")
    processes.broadcast_deltas(jobs[0].trainer.model, deltas, next(deltas[0].parameters()).device)


def _check(jobs: Sequence[Job]) -> None:
    """Raises PeftliteError unless jobs share a base, and nothing else."""
    first, *others = jobs
    if any(job.trainer.model is not first.trainer.model for job in others):
        raise PeftliteError("the trainers are of several models: one base is to be shared")
    for name in ("gradient_checkpointing", "parallel", "compile"):
        if len(values := {getattr(job.trainer, name) for job in jobs}) > 1:
            raise PeftliteError(f"{name} is the model's, so one for all trainers, not {values}")
    folders = [os.path.abspath(f) for job in jobs if (f := job.trainer.folder) is not None]
    deltas = {id(job.delta) for job in jobs}
    if len(deltas) < len(jobs) or len({*folders}) < len(folders):
        raise PeftliteError(
            "two trainers have one delta, or one folder: name each one's own, as delta= and folder="
        )


@contextmanager
def _bank(model: nn.Module, deltas: Sequence[Delta], slots: int) -> Iterator[DeltaBank]:
    """A bank with room for deltas to train in, while the choice that stood is put aside."""
    found = find(model)
    standing = () if found is None else found[1].choice.standing
    ranks = [
        len(item.patch.factors()[0])
        for delta in deltas
        for item in delta.placed.values()
        if isinstance(item.patch, LowRankPatch)
    ]
    bank = DeltaBank(model, slots, max(ranks, default=1), [*deltas])
    try:
        for delta in deltas:
            bank.adopt("job", delta)  # or it raises, before anything trains
            bank.evict("job")
            bank.drop("job")
        yield bank
    finally:
        bank.close()
        if standing:
            use(model, standing)
