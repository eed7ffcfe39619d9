"""Trainer: the settings of a training run, and what the model is put into while it lasts."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from peftlite.core.delta import Delta
from peftlite.core.find import named, require
from peftlite.errors import PeftliteError
from peftlite.fields import check_fields, integer, number, one_of, positive, set_number
from peftlite.io.files import as_path
from peftlite.io.native import base_of
from peftlite.spelling import Spelled
from peftlite.table import Shown, listed, short, table
from peftlite.train import data, modes, parallel
from peftlite.train.auto import learning_rate
from peftlite.train.checkpoints import Checkpoints
from peftlite.train.events import Callback, Log, Progress
from peftlite.train.given import check_dataset, check_length, held
from peftlite.train.halving import Contender
from peftlite.train.history import History
from peftlite.train.loader import Collate, Loader
from peftlite.train.loop import Run
from peftlite.train.measure import Loss, Validator, check_loss
from peftlite.train.parallel import Parallel, Processes
from peftlite.train.schedule import Schedule, adamw, parameter_groups
from peftlite.train.settings import Autocast, Settings
from peftlite.train.state import Tree, fork_rng
from peftlite.train.together.batcher import Shared

Auto = Literal["auto"]
Resume = bool | str | os.PathLike[str]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _or_auto(kind: type, allowed: Callable[[Any], bool], what: str) -> dict[str, Any]:
    """What a field is checked by: a number, or "auto"."""

    def check(trainer: Trainer, name: str) -> None:
        if getattr(trainer, name) != "auto":
            set_number(trainer, name, kind, allowed, f"{what}, or 'auto'")

    return {"check": check}


_COUNT = _or_auto(int, lambda n: n >= 1, "a whole number from 1 up")
_RATE = _or_auto(float, lambda x: 0 < x < math.inf, "finite and above 0")


@dataclass(eq=False, repr=False)
class Trainer(Shown, Spelled):
    """Trains a model's delta: `pl.Trainer(model, loss, train, val).fit()`.

    Nothing else of the model changes: not the base, not its running statistics, not the modes of
    its modules. Everything random comes from `seed`, and Python's, NumPy's and torch's global
    generators are as before afterwards: the same call gives the same bits.

    Args:
        model: any module with a delta that is chosen and trainable, as `pl.attach` leaves it.
        loss: `f(model, batch)`, a mean over the batch, as a tensor or a dict (see `pl.losses`).
        train, val: datasets: a length, and examples by index; or streams, as torch's
            `IterableDataset`, which begin anew each time. `val` is read to its end and held.
        delta: the name of the delta to train, or names; all that are chosen and trainable if None.
        epochs: passes over `train`; "auto" and for `batch_size` go by the number of examples, as
            `pl.data.estimate` says.
        examples: of an epoch, for a `train` without a length; the next one goes on from there.
        batch_size: examples per step of the optimizer.
        accumulate: parts that a step's batch comes in: less memory, and the same gradients.
        lr: the peak of the learning rate; "auto" goes by the methods and the model's width, see
            `peftlite/train/auto.py`.
        lr_multiplier: of that rate.
        b_ratio: of LoRA+, how much faster factors B learn.
        optimizer: makes one of parameter groups; AdamW if None.
        weight_decay: of matrices; vectors never decay.
        schedule: after the warm-up: "cosine" or "linear" towards zero, or "constant".
        warmup: the share of the steps over which the rate rises.
        clip: the largest norm of the gradients; `math.inf` leaves them as they are.
        autocast: "bf16" or "fp16" (whose losses are scaled) for the forward pass.
        parallel: in the processes that torchrun started, each of which takes a share of every
            batch: "ddp" has the whole model in each, "fsdp" spreads the base over them, and "auto"
            is "ddp", or "fsdp" where that takes more than half of a device's memory. None: every
            process trains for itself.
        gradient_checkpointing: compute the blocks' activations again instead of keeping them.
        compile: train `torch.compile(model)`.
        collate: a batch of examples; `pl.data.collate` pads, and stacks what isn't text.
        num_workers: processes that make batches ahead; the numbers are the same with any.
        shuffle: whether an epoch comes in an order of its own; a stream always has its own.
        valid_every: steps from one loss on a batch of `val` to the next; None for none.
        metric: by which an epoch is the best, any field of its event; a name that ends in "loss"
            or "perplexity" is to fall, others are to rise.
        patience: epochs without a better `metric` after which to stop; None never does.
        probes: functions of the model that give a score, higher is better, of what it could do
            before; run before training and after every epoch. Their fall is what was forgotten.
        folder: for checkpoints and `events.jsonl`; None keeps nothing on disk.
        keep: how many checkpoints stay, of those at the end of an epoch and of those between; and
            the best one.
        save_every: steps between checkpoints within an epoch; None for none.
        check_every: steps between looks at whether the loss is finite, which make the host wait
            for a GPU; None for 1 on a CPU and 16 elsewhere. An update that wasn't good is undone.
        seed: of the order of the data, dropout, and whatever else is drawn.
        callbacks: see `pl.Callback`; `pl.TensorBoard` and `pl.WandB` are such.
        progress: whether to print the settings and show a bar.

    Raises:
        PeftliteError: an argument isn't of these, or no delta is there to train.

    Example:
        model, data = nn.Linear(4, 3), [(torch.randn(4), i % 3) for i in range(30)]
        pl.attach(model, pl.LoRA(rank=2, targets="weight"), name="sql")
        trainer = pl.Trainer(model, pl.losses.classification, data[6:], data[:6], epochs=2)
        print(trainer.fit())
    """

    model: nn.Module
    loss: Loss
    train: Any
    val: Any = None
    _: KW_ONLY
    delta: str | Sequence[str] | None = None
    epochs: int | Auto = field(default="auto", metadata=_COUNT)
    examples: int | None = integer(None)
    batch_size: int | Auto = field(default="auto", metadata=_COUNT)
    accumulate: int = integer(1)
    lr: float | Auto = field(default="auto", metadata=_RATE)
    lr_multiplier: float = positive(1.0)
    b_ratio: float = positive(1.0)
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None
    weight_decay: float = number(0.01, float, lambda x: 0 <= x < math.inf, "0 or above")
    schedule: Schedule = one_of("cosine", Schedule)
    warmup: float = number(0.03, float, lambda x: 0 <= x < 1, "in [0, 1)")
    clip: float = number(1.0, float, lambda x: x > 0, "above 0")
    autocast: Autocast | None = one_of(None, Autocast)
    parallel: Parallel = one_of("auto", Parallel)
    gradient_checkpointing: bool = False
    compile: bool = False
    collate: Collate = data.collate
    num_workers: int = integer(0, least=0)
    shuffle: bool = True
    valid_every: int | None = integer(None)
    metric: str = "full_valid_loss"
    patience: int | None = integer(None)
    probes: Mapping[str, Callable[[nn.Module], float]] = field(default_factory=dict)
    folder: str | os.PathLike[str] | None = None
    keep: int = integer(3)
    save_every: int | None = integer(None)
    check_every: int | None = integer(None)
    seed: int = number(0, int, lambda n: 0 <= n < 2**63, "from 0 up to 2**63 - 1")
    callbacks: Sequence[Callback] = ()
    progress: bool = True

    def __post_init__(self) -> None:
        self.stopping: bool = False
        check_fields(self)
        for name, function in {"loss": self.loss, "collate": self.collate, **self.probes}.items():
            if not callable(function) or (name == "loss" and isinstance(function, type)):
                raise PeftliteError(f"{name} must be a function, not {short(function)}")
        check_loss(self.loss)
        if self.patience and self.val is None and self.metric.startswith("full_valid"):
            raise PeftliteError(f"patience goes by {self.metric}: give val=, or another metric=")
        check_dataset("train", self.train, self.collate)
        self._examples = check_length(self.train, self.examples)
        if self.val is not None:
            check_dataset("val", self.val, self.collate)
        self._val = held("val", self.val)
        usual = data.estimate(self._examples)
        self._epochs = usual.epochs if self.epochs == "auto" else self.epochs
        self._batch_size = usual.batch_size if self.batch_size == "auto" else self.batch_size
        self._lr = (
            learning_rate(self.model, self.deltas, self.b_ratio) if self.lr == "auto" else self.lr
        )
        self._processes = parallel.world_size(self.parallel)

    @property
    def deltas(self) -> list[Delta]:
        """The deltas to train. Raises PeftliteError if there is none."""
        _, registry = require(self.model)
        given = [self.delta] if isinstance(self.delta, str | Delta) else self.delta
        asked = None if given is None else [named(registry, each) for each in given]
        standing = registry.choice.standing
        beside = getattr(self.loss, "trains", ())  # deltas that the loss chooses by itself
        chosen = [registry.deltas[name] for name in standing]
        chosen += [named(registry, name) for name in beside if name not in standing]
        trainable = [
            delta
            for delta in chosen
            if (asked is None or delta in asked)
            and any(p.requires_grad for p in delta.parameters())
        ]
        if len(trainable) < (1 if asked is None else len(asked)):
            wanted = "one" if asked is None else listed(repr(delta.name) for delta in asked)
            merged = listed(map(repr, registry.merged))
            unmerge = f"pl.unmerge(model, name), for {merged} is merged; " if merged else ""
            raise PeftliteError(
                f"to train {wanted}, it has to be chosen and trainable; chosen are "
                f"{listed(map(repr, standing)) or 'none'} of {listed(map(repr, registry.deltas))}: "
                f"{unmerge}pl.use(model, name), and pl.deltas(model)[name].requires_grad_()"
            )
        return trainable

    @property
    def total_steps(self) -> int:
        """Steps of the optimizer, in all."""
        return self._epochs * math.ceil(self._examples / self._batch_size)

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on, as JSON holds it."""
        return asdict(self._decided())

    def _decided(self) -> Settings:
        """The settings, with a number in place of "auto"."""
        decided = {
            "epochs": self._epochs, "batch_size": self._batch_size, "lr": self._lr,
            "examples": self._examples, "steps": self.total_steps, "processes": self._processes,
            "choice": [*require(self.model)[1].choice.standing],
        }  # fmt: skip
        given = {each.name: getattr(self, each.name, None) for each in fields(Settings)}
        return Settings(**{**given, **decided})

    def _summary(self) -> str:
        return f"{self._epochs} epochs, {self.total_steps:,} steps of {self._batch_size} examples"

    def _lines(self) -> Iterator[str]:
        def how(name: str) -> str:
            return "auto" if getattr(self, name, None) == "auto" else ""

        rows = [[name, str(value), how(name)] for name, value in self.settings().items()]
        yield table(["setting", "value", ""], rows)

    def stop(self) -> None:
        """Ends training after the step at hand; `fit(resume=True)` goes on."""
        self.stopping = True

    def fit(self, resume: Resume = False) -> History:
        """Trains to the end, or until it stops early, and gives what was measured.

        Args:
            resume: True goes on from the newest whole checkpoint in `folder`, or begins if there is
                none; a path goes on from that checkpoint. What comes out is bit for bit what would
                have, had training never stopped.

        Raises:
            FileError: a checkpoint is damaged, or is of other settings; or there are some already,
                and `resume` doesn't say so.
            PeftliteError: no delta is there to train, the loss isn't finite, or memory doesn't
                suffice. The deltas are then as after the last good step.
        """
        self.stopping = False
        with parallel.process_group(self.parallel) as processes, ExitStack() as held:
            return processes.broadcast(self._fit(resume, processes, held))

    def _fit(self, resume: Resume, processes: Processes, held: ExitStack) -> History:
        """What each of the processes does."""
        deltas = self.deltas
        parallel.check_unsharded(deltas)
        processes.check_same("the settings", self.settings(), "give all processes the same")
        settings = self._decided()
        store, state = self._checkpoints(resume, deltas, settings, processes, held)
        device = trainable(deltas)[0].device
        processes.broadcast_deltas(self.model, deltas, device)
        with (
            self._prepared(deltas) as model,
            fork_rng(device, processes.seed(self.seed)),
            self._advised(settings),
        ):
            run = self._run(model, deltas, settings, store, processes)
            return self._done(run, state)

    @contextmanager
    def _prepared(self, deltas: list[Delta]) -> Iterator[nn.Module]:
        """The model as it is while deltas train: the one place where it is wrapped."""
        with ExitStack() as stack:
            stack.enter_context(modes.others_frozen(self.model, trainable(deltas)))
            stack.enter_context(modes.training(self.model))
            if self.gradient_checkpointing:
                stack.enter_context(modes.gradient_checkpointing(self.model))
            if parallel.will_shard(self.parallel, self.model):
                parallel.shard(self.model, deltas)
                stack.callback(self.model.reshard)  # a forward pass leaves the root as it was
            yield torch.compile(self.model) if self.compile else self.model  # type: ignore

    def _fit_shared(
        self,
        shared: Shared,
        deltas: list[Delta],
        settings: Settings,
        resume: Resume,
        processes: Processes,
        callback: Callback,
        contender: Contender | None,
    ) -> History:
        """`fit` among others, on a model that is prepared for all, with a callback of theirs."""
        device, seed = trainable(deltas)[0].device, processes.seed(self.seed)
        with ExitStack() as held, fork_rng(device, seed), self._advised(settings):
            store, state = self._checkpoints(resume, deltas, settings, processes, held)
            run = self._run(shared, deltas, settings, store, processes, callback)
            run.go_back, run.contender = shared.back, contender
            if contender is not None:
                contender.meet = shared.meet
            return self._done(run, state)

    def _done(self, run: Run, state: dict[str, Tree] | None) -> History:
        """The history of a run, from a state on if there is one."""
        if state is not None:
            run.resume(state)
        with run.log.opened(self, run.step), closing(run.loader):
            run.train()
            if run.store is not None and run.best["name"]:
                run.history.best = run.store.folder / run.best["name"]
        return run.history

    def _checkpoints(
        self,
        resume: Resume,
        deltas: list[Delta],
        settings: Settings,
        processes: Processes,
        held: ExitStack,
    ) -> tuple[Checkpoints | None, dict[str, Tree] | None]:
        """Where checkpoints go, and the state to go on from; None for neither."""
        if self.folder is None:
            if resume:
                raise PeftliteError("resume goes by checkpoints: give the Trainer a folder")
            return None, None
        bases = {delta.name: base_of(delta, "sha256") for delta in deltas}
        store = Checkpoints(as_path(self.folder), self.keep, self.save_every, bases)
        processes.on_first(lambda: held.enter_context(store.locked()))
        given = (resume, self.model, deltas, asdict(settings))
        return store, processes.on_first(lambda: store.resume(*given))

    def _run(
        self,
        model: nn.Module,
        deltas: list[Delta],
        settings: Settings,
        store: Checkpoints | None,
        processes: Processes,
        callback: Callback | None = None,
    ) -> Run:
        """A run, and all that it takes; with a callback it is one of several."""
        device = trainable(deltas)[0].device
        loss, lr = self.loss, settings.lr * self.lr_multiplier
        if self.autocast is not None:
            loss = torch.autocast(device.type, AUTOCAST[self.autocast])(loss)
        groups = parameter_groups(deltas, lr, self.b_ratio, self.weight_decay)
        shard = {"rank": processes.rank, "processes": processes.size}
        given = {"collate": self.collate, "seed": self.seed, "workers": self.num_workers}
        loader = partial(Loader, device=device, **given, **shard)
        val = self._val  # perhaps an array, which has no truth
        val = None if val is None else loader(val, settings.micro_batch, shuffle=False)
        train = loader(
            self.train, settings.batch_size, accumulate=self.accumulate, shuffle=self.shuffle,
            examples=self._examples,
        )  # fmt: skip
        return Run(
            settings, model, deltas, loss, train,
            Validator(model if callback else self.model, model, loss, val, self.valid_every,
                      self.probes, device, processes),
            (self.optimizer or adamw)(groups),
            self._log(store, device, processes, callback), store,
            processes, self.check_every or (1 if device.type == "cpu" else 16),
            lambda: self.stopping,
        )  # fmt: skip

    def _log(
        self,
        store: Checkpoints | None,
        device: torch.device,
        processes: Processes,
        callback: Callback | None,
    ) -> Log:
        """Where events go: from the first process alone."""
        if not processes.first:
            return Log(None, (), device)
        first = [] if callback is None else [callback]
        if self.progress and callback is None:
            print(self)
            first = [Progress()]
        path = store and store.folder / "events.jsonl"
        return Log(path, [*first, *self.callbacks], device)

    @contextmanager
    def _advised(self, settings: Settings) -> Iterator[None]:
        """Says what to change where memory doesn't suffice."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            known = isinstance(error, torch.OutOfMemoryError | MemoryError)
            if not known and "DefaultCPUAllocator" not in str(error):
                raise
            most = math.ceil(settings.micro_batch / settings.processes)
            ways = {
                f"accumulate={2 * self.accumulate}, for the same result": most > 1,
                "shorter examples": most == 1,
                "gradient_checkpointing=True": not self.gradient_checkpointing,
                "autocast='bf16'": self.autocast is None,
            }
            advice = ", or ".join(way for way, is_left in ways.items() if is_left)
            raise PeftliteError(
                f"out of memory with {most} examples at a time: try {advice}"
            ) from error


def trainable(deltas: Sequence[Delta]) -> list[nn.Parameter]:
    """The parameters of deltas that are to learn."""
    return [p for delta in deltas for p in delta.parameters() if p.requires_grad]
