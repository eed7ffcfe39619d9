"""Run: one fit, from its first step or from a checkpoint; the training loop."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftlite.core.delta import Delta
from peftlite.core.patch import Patch
from peftlite.core.tensors import unshard
from peftlite.errors import FileError, PeftliteError
from peftlite.table import listed
from peftlite.train import state
from peftlite.train.checkpoints import Checkpoints
from peftlite.train.events import Log
from peftlite.train.loader import Batches, write_batch
from peftlite.train.measure import Judge, Tally, falls, memory, tokens
from peftlite.train.parallel import Processes
from peftlite.train.schedule import adamw, groups, pace

if TYPE_CHECKING:
    from peftlite.train.trainer import Trainer

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Run:
    """What changes while deltas train, on a model that is prepared for it.

    Args:
        model: the trainer's own, or what wraps it.
        log: of which the history is a part.
        store: of checkpoints; None keeps none.
        processes: those that do it together, of which this is one.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: nn.Module,
        deltas: list[Delta],
        log: Log,
        store: Checkpoints | None,
        processes: Processes,
    ) -> None:
        self.trainer, self.model, self.deltas = trainer, model, deltas
        self.processes = processes
        self.log, self.history, self.store = log, log.history, store
        self.parameters = [p for d in deltas for p in d.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.regularized = [delta for delta in deltas if _has_regularizer(delta)]
        peak = trainer.rate * trainer.lr_multiplier
        own = groups(deltas, peak, trainer.b_ratio, trainer.weight_decay)
        self.optimizer = (trainer.optimizer or adamw)(own)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=trainer.autocast == "fp16")
        share = processes.rank, processes.size
        batches = partial(Batches, collate=trainer.collate, device=self.device, share=share)
        seed = trainer.seed if trainer.shuffle else None
        self.batches = batches(trainer.train, trainer.size, seed=seed)
        part = math.ceil(trainer.size / trainer.accumulate)
        val = None if trainer.val is None else batches(trainer.val, part)
        self.judge = Judge(
            trainer.model, model, self.loss, val, trainer.probes, self.device, processes
        )

        self.step, self.saved = 0, -1
        self.best: dict[str, Any] = {"value": None, "epoch": 0, "name": ""}
        self.check_every = trainer.check_every or (1 if self.device.type == "cpu" else 16)
        self.unseen: list[Tensor] = []  # whether the steps since the last look were sound
        self.sound_state: state.Tree = None  # at that look, where looks are more than a step apart
        self.tokens, self.since = 0, perf_counter()
        self.stopping = False

    # -- the loop

    def train(self) -> None:
        """Every step from where it is to the end."""
        if self.step == 0:
            self.log.add(self.place | self.judge.whole(), {})
        self.settle()
        while not self.finished():
            losses, parts = self.backward()
            norm = unshard(nn.utils.clip_grad_norm_(self.parameters, self.trainer.clip))
            rests = self.rests(self.step + 1)
            if not self.sound(losses, norm, rests):
                self.rewind(losses, norm, parts)
                continue
            rate = self.update()
            self.step += 1
            event = self.place | {"lr": rate, "grad_norm": norm}
            tallies = {"train": losses, **self.glance()}
            self.log.add(event | (self.judge.whole() if self.ends_epoch else {}), tallies)
            if rests:
                self.settle()
        if self.store is not None and self.saved != self.step:
            self.save()

    def backward(self) -> tuple[Tally, list[Any]]:
        """Fills the gradients of a step's mean loss, Σ countₖ·lossₖ / Σ countₖ over its parts."""
        losses, parts, scale = Tally(), [], None
        whole = self.trainer.accumulate == self.processes.size == 1
        for batch, rows in self.batches.of(self.step, self.trainer.accumulate):
            loss, count = losses.add(self.loss(self.model, batch), rows)
            for delta in self.regularized:
                loss = loss + delta.regularizer().to(loss.device)
            if not whole:
                if scale is None:  # of the mean's order, since fp16 overflows with a sum's
                    self.processes.add([scale := count.clone()])
                    scale.clamp_(min=1)
                loss = loss * (count / scale)
            self.scaler.scale(loss).backward()
            parts.append(batch)
            self.tokens += tokens(batch, rows)
        losses.over(self.processes)
        if scale is not None:
            scale = scale / losses.count.clamp(min=1e-12)
            for device in {p.device for p in self.parameters}:
                grads = [p.grad for p in self.parameters if p.device == device]
                torch._foreach_mul_([g for g in grads if g is not None], scale.to(device))  # type: ignore
            self.processes.add_gradients(self.parameters)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        return losses, parts

    def update(self) -> float:
        """A step of the optimizer, and of the methods that act after it. Returns the rate."""
        share = pace(
            self.step, self.trainer.total_steps, self.trainer.warmup, self.trainer.schedule
        )
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = share * rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for delta in self.deltas:
            delta.step()
        self.optimizer.zero_grad()
        return share * self.rates[0]

    def loss(self, model: nn.Module, batch: Any) -> Any:
        with self.autocast:
            return self.trainer.loss(model, batch)

    @property
    def autocast(self) -> AbstractContextManager[Any]:
        given = self.trainer.autocast
        return nullcontext() if given is None else torch.autocast(self.device.type, AUTOCAST[given])

    def glance(self) -> dict[str, Tally]:
        """The loss on one batch of the validation set, if it is time."""
        every = self.trainer.valid_every
        return self.judge.glance(self.step // every - 1) if every and not self.step % every else {}

    def settle(self) -> None:
        """Tells what was measured, compares, writes what is due, and keeps the state it is in."""
        (tokens,) = self.processes.counted([self.tokens])
        speed = tokens / (perf_counter() - self.since) if tokens else None
        self.log.flush(tokens_per_second=speed, memory=memory(self.device))
        if self.step != self.saved:  # unless it has just been resumed
            if self.ends_epoch or self.step == 0:
                self.compare()
            if self.store is not None and (self.ends_epoch or self.due(self.step)):
                self.save()
        self.sound_state = state.copied(self.state()) if self.check_every > 1 else None
        self.tokens, self.since = 0, perf_counter()
        self.heed()

    def heed(self) -> None:
        """Whether any process was asked to stop."""
        self.stopping = self.processes.counted([self.trainer.stopping]) != [0]

    def compare(self) -> None:
        """Whether this epoch is the best so far."""
        metric, event = self.trainer.metric, self.history.events[-1]
        # what the loss function itself says of training is known after the first step
        if metric not in event and (self.step or not metric.startswith(("train_", "valid_"))):
            raise PeftliteError(f"no metric is called {metric!r}; there are {listed(event, 99)}")
        value, best = event.get(metric), self.best["value"]
        if value is None or self.step == 0:
            return
        if best is None or (value < best if falls(metric) else value > best):
            self.best = {"value": value, "epoch": self.epoch, "name": self.name}

    # -- where it is

    @property
    def epoch(self) -> int:
        return self.step // self.batches.per_epoch

    @property
    def ends_epoch(self) -> bool:
        return self.step > 0 and self.step % self.batches.per_epoch == 0

    @property
    def name(self) -> str:
        return f"step-{self.step:08d}" + (f"-epoch-{self.epoch}" if self.ends_epoch else "")

    @property
    def place(self) -> dict[str, Any]:
        epoch = self.step / self.batches.per_epoch
        return {"step": self.step, "total_steps": self.trainer.total_steps, "epoch": epoch}

    def rests(self, step: int) -> bool:
        """Whether the host waits for the device after a step, to look, to tell and to keep."""
        self.heed()
        ends = not step % self.check_every or not step % self.batches.per_epoch
        return ends or self.due(step) or self.stopping

    def due(self, step: int) -> bool:
        """Whether a checkpoint is, within an epoch."""
        every = self.trainer.save_every
        return step > 0 and every is not None and step % every == 0

    def finished(self) -> bool:
        """Whether it ends here; the history tells why."""
        patience = self.trainer.patience
        if patience is not None and self.epoch - self.best["epoch"] >= patience:
            self.history.stopped = "early"
        elif self.step >= self.trainer.total_steps:
            self.history.stopped = "done"
        elif self.stopping and not self.unseen:
            self.history.stopped = "asked"
        return self.history.stopped != ""

    # -- what is kept

    def state(self) -> dict[str, state.Tree]:
        """All that the rest of the run depends on, as this process has it."""
        return {
            "place": self.place,
            "settings": self.trainer.settings(),
            "best": self.best,
            "before": self.judge.before,
            "deltas": {delta.name: delta.state_dict() for delta in self.deltas},
            "kind": type(self.optimizer).__name__,
            "optimizer": state.optimizer_state(self.optimizer),
            "scaler": self.scaler.state_dict(),
            "random": state.random_state(self.device),
        }

    def restore(self, tree: dict[str, state.Tree]) -> None:
        """Goes back, or on, to a state. Raises FileError if it is of another optimizer."""
        if tree["kind"] != (kind := type(self.optimizer).__name__):
            raise FileError(
                f"the checkpoint is of a run with {tree['kind']}, and the optimizer here is {kind}"
            )
        self.step = self.saved = tree["place"]["step"]
        self.best, self.judge.before = tree["best"], tree["before"]
        for delta in self.deltas:
            delta.load_state_dict(tree["deltas"][delta.name])
        state.set_optimizer_state(self.optimizer, tree["optimizer"])
        self.scaler.load_state_dict(tree["scaler"])
        state.set_random_state(tree["random"], self.device)

    def save(self) -> None:
        """Writes a checkpoint, the first process for all."""
        tree = self.state()
        tree["random"] = self.processes.gathered(tree["random"])

        def write() -> None:
            self.log.sync()
            self.store.write(self.name, self.deltas, tree, self.best["name"])

        self.processes.once(write)
        self.saved = self.step

    def sound(self, losses: Tally, norm: Tensor, looks: bool) -> bool:
        """Whether the update can be made; between looks it is assumed."""
        healthy = losses.loss.isfinite()
        if not self.scaler.is_enabled():  # which leaves out the step, if the gradients aren't
            healthy = healthy & norm.isfinite()
        self.unseen.append(healthy)
        if not looks:
            return True
        seen, self.unseen = self.unseen, []
        return bool(torch.stack(seen).all())

    def rewind(self, losses: Tally, norm: Tensor, parts: list[Any]) -> None:
        """Goes back to the last look, to find the step that wasn't sound; there, it raises."""
        self.optimizer.zero_grad()
        if self.sound_state is not None:
            self.restore(self.sound_state)
            self.log.drop()
            self.check_every, self.sound_state = 1, None
            return
        where = ""
        if self.store is not None:
            share = f"-of-{self.processes.rank}" if self.processes.size > 1 else ""
            path = self.store.folder / f"not-finite-{self.step + 1:08d}{share}.safetensors"
            write_batch(path, parts)
            where = f"; its batch is in {str(path)!r}"
        raise PeftliteError(
            f"at step {self.step + 1} the loss is {losses.loss.item():g} and the norm of its "
            f"gradients {norm.item():g}: {listed(repr(delta.name) for delta in self.deltas)} stays "
            f"as after step {self.step}{where}. Look at that batch, or lower lr_multiplier"
        )


def _has_regularizer(delta: Delta) -> bool:
    patches = (placed.patch for placed in delta.placed.values())
    return any(type(patch).regularizer is not Patch.regularizer for patch in patches)
