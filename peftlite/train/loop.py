"""Run: one fit, from its first step or from a checkpoint; the training loop."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.delta import Delta
from peftlite.core.patch import Patch
from peftlite.core.tensors import unshard
from peftlite.errors import FileError, PeftliteError
from peftlite.table import listed
from peftlite.train import measure, state
from peftlite.train.checkpoints import Checkpoints
from peftlite.train.events import Log
from peftlite.train.given import digest
from peftlite.train.halving import Contender
from peftlite.train.history import History
from peftlite.train.loader import Loader, write_batch
from peftlite.train.measure import Loss, Metrics, Validator
from peftlite.train.parallel import Processes
from peftlite.train.schedule import lr_factor
from peftlite.train.settings import Settings

LOOKS = 16  # steps within which every parameter should get a gradient


@dataclass(eq=False)
class Run:
    """What changes while deltas train, on a model that is prepared for it.

    Args:
        model: the user's, or what wraps it.
        log: its history is the run's.
        store: of checkpoints; None keeps none.
        processes: that train together, of which this is one.
        check_every: steps between checks of whether the loss is finite.
        stop_asked: whether the user wants it to end.
    """

    settings: Settings
    model: nn.Module
    deltas: list[Delta]
    loss: Loss
    loader: Loader
    validator: Validator
    optimizer: torch.optim.Optimizer
    log: Log
    store: Checkpoints | None
    processes: Processes
    check_every: int
    stop_asked: Callable[[], bool]

    def __post_init__(self) -> None:
        self.history: History = self.log.history
        self.go_back: Callable[[Tensor], None] = torch.autograd.backward
        self.contender: Contender | None = None  # of those that train together
        self.parameters: list[nn.Parameter] = [
            p for d in self.deltas for p in d.parameters() if p.requires_grad
        ]
        self.device: torch.device = self.loader.device
        own: Any = inspect.unwrap(self.loss)  # as it is without autocast
        self.loss_state: Any = own if hasattr(own, "load_state_dict") else None
        self.after_step: Callable[[Any], None] | None = getattr(own, "after_step", None)
        named = {f"{d.name}:{key}": p for d in self.deltas for key, p in d.named_parameters()}
        self.unreached: dict[str, nn.Parameter] = {
            name: p for name, p in named.items() if p.requires_grad
        }
        self.parameter_names: dict[nn.Parameter, str] = {p: name for name, p in named.items()}
        self.looks: int = min(LOOKS, self.loader.steps_per_epoch)  # still to come, for those
        self.regularized: list[Delta] = [delta for delta in self.deltas if _has_regularizer(delta)]
        self.peak_lrs: list[float] = [group["lr"] for group in self.optimizer.param_groups]
        self.options: dict[str, str] = {
            f"{name} of group {i}": repr(value)
            for i, group in enumerate(self.optimizer.param_groups)
            for name, value in group.items()
            if name not in ("params", "lr")
        }
        fp16 = self.settings.autocast == "fp16"
        self.scaler: torch.amp.GradScaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.step, self.saved_step = 0, -1
        self.batches: list[Any] = []  # of the last step
        self.best: dict[str, Any] = {"value": None, "epoch": 0, "name": ""}
        self.unchecked: list[Tensor] = []  # whether the steps since the last check were finite
        self.snapshot: state.Tree = None  # of the last check, where checks are steps apart
        self.tokens, self.since = 0, perf_counter()
        self.stopping = False

    # -- the loop

    def train(self) -> None:
        """Every step from the one at hand to the end."""
        if self.step == 0:
            self.log.add(self.position | self.validator.validate(), {})
        self.synchronize()
        while not self.finished():
            losses = self.backward()
            self.look_for_unreached()
            norm = unshard(nn.utils.clip_grad_norm_(self.parameters, self.settings.clip))
            synchronizes = self.synchronizes(self.step + 1)
            if not self.is_finite(losses, norm, synchronizes):
                self.rewind(losses, norm)
                continue
            lr = self.update()
            self.step += 1
            if self.contender is not None:
                self.contender.step(self.parameters, self.step)
            event = self.position | {"lr": lr, "grad_norm": norm}
            metrics = {"train": losses, **self.validator.validate_batch(self.step)}
            self.log.add(event | (self.validator.validate() if self.ends_epoch else {}), metrics)
            if synchronizes:
                self.synchronize()
        if self.store is not None and self.saved_step != self.step:
            self.save(self.store)

    def backward(self) -> Metrics:
        """Fills the gradients of a step's mean loss, Σ countₖ·lossₖ / Σ countₖ over its parts."""
        losses, scale = Metrics(), None
        self.batches.clear()
        is_one_part = self.settings.accumulate == self.processes.size == 1
        for batch, examples in self.loader.ahead(self.step):
            loss, count = losses.add(self.loss(self.model, batch), examples)
            for delta in self.regularized:
                loss = loss + delta.regularizer().to(loss.device)
            if not is_one_part:
                if scale is None:  # of the mean's order, since fp16 overflows with a sum's
                    self.processes.all_reduce([scale := count.clone()])
                    scale.clamp_(min=1)
                loss = loss * (count / scale)
            if not loss.requires_grad:
                raise PeftliteError(
                    f"the loss doesn't go back to {self.names}: see that nothing between is under "
                    "torch.no_grad, detached, or of a model without it"
                )
            self.go_back(self.scaler.scale(loss))
            self.batches.append(batch)
            self.tokens += measure.count_tokens(batch, examples)
        losses.all_reduce(self.processes)
        if scale is not None:
            scale = scale / losses.count.clamp(min=1e-12)
            for device in {p.device for p in self.parameters}:
                grads = [p.grad for p in self.parameters if p.device == device]
                torch._foreach_mul_([g for g in grads if g is not None], scale.to(device))  # type: ignore
            self.processes.all_reduce_gradients(self.parameters)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        return losses

    def look_for_unreached(self) -> None:
        """Warns, once, of parameters to which none of the first steps gave a gradient."""
        if self.looks == 0:
            return
        self.looks -= 1
        self.unreached = {name: p for name, p in self.unreached.items() if p.grad is None}
        if self.unreached and self.looks == 0 and self.processes.first:
            sites = dict.fromkeys(name.rpartition(":")[0] for name in self.unreached)
            warnings.warn(
                f"no gradient has reached {listed(sites)}: they stay as they are. If the model "
                "should use them, see that they aren't under torch.no_grad or detached; if not, "
                "exclude them",
                stacklevel=6,
            )

    def update(self) -> float:
        """A step of the optimizer, and of what acts after it. Returns the rate."""
        given = self.settings
        factor = lr_factor(self.step, given.steps, given.warmup, given.schedule)
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = factor * peak
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for delta in self.deltas:
            delta.step()
        if self.after_step is not None:
            self.after_step(self.model)
        self.optimizer.zero_grad()
        return factor * self.peak_lrs[0]

    def synchronize(self) -> None:
        """Waits for the device: passes events on, writes what is due, keeps a snapshot."""
        (tokens,) = self.processes.sum([self.tokens])
        speed = tokens / (perf_counter() - self.since) if tokens else None
        self.log.flush(tokens_per_second=speed, memory=measure.peak_memory(self.device))
        if self.step != self.saved_step:  # unless it has just been resumed
            if self.ends_epoch or self.step == 0:
                self.update_best()
            self.judge()
            if self.store is not None and (self.ends_epoch or self.store.is_due(self.step)):
                self.save(self.store)
        self.snapshot = state.clone(self.state()) if self.check_every > 1 else None
        self.tokens, self.since = 0, perf_counter()
        if self.contender is not None and (rung := self.rung) is not None:
            self.contender.await_verdict(rung)
        self.update_stopping()

    def update_stopping(self) -> None:
        """Whether any process was asked to stop."""
        self.stopping = self.processes.sum([self.stop_asked()]) != [0]

    def judge(self) -> None:
        """Has the metric of the mean of the steps so far compared with that of others, if due."""
        contender = self.contender
        if contender is None or (rung := self.rung) is None:
            return

        def found() -> float:
            event = self.history.events[-1] | self.validator.validate()
            return float(event.get(contender.metric, math.nan))

        contender.judge(rung, self.parameters, found)

    @property
    def rung(self) -> int | None:
        """At which it is compared with others now, if at any."""
        if self.contender is None or not self.ends_epoch:
            return None
        return self.contender.rung(self.epoch, self.settings.epochs)

    def update_best(self) -> None:
        """Whether this epoch is the best so far."""
        metric, event = self.settings.metric, self.history.events[-1]
        # the fields of the loss function for training are known after the first step
        if metric not in event and (self.step or not metric.startswith(("train_", "valid_"))):
            raise PeftliteError(f"no metric is called {metric!r}; there are {listed(event, 99)}")
        value, best = event.get(metric), self.best["value"]
        if value is None or self.step == 0:
            return
        if best is None or measure.best_of(metric)(value, best) != best:
            self.best = {"value": value, "epoch": self.epoch, "name": self.name}

    # -- the step at hand

    @property
    def epoch(self) -> int:
        return self.step // self.loader.steps_per_epoch

    @property
    def ends_epoch(self) -> bool:
        return self.step > 0 and self.step % self.loader.steps_per_epoch == 0

    @property
    def names(self) -> str:
        """Of the deltas, in words."""
        return listed(repr(delta.name) for delta in self.deltas)

    @property
    def name(self) -> str:
        """Of the checkpoint."""
        return f"step-{self.step:08d}" + (f"-epoch-{self.epoch}" if self.ends_epoch else "")

    @property
    def position(self) -> dict[str, Any]:
        epoch = self.step / self.loader.steps_per_epoch
        return {"step": self.step, "total_steps": self.settings.steps, "epoch": epoch}

    def synchronizes(self, step: int) -> bool:
        """Whether the host waits for the device after a step, to check, to report and to save."""
        self.update_stopping()
        saves = self.store is not None and self.store.is_due(step)
        ends = not step % self.check_every or not step % self.loader.steps_per_epoch
        return ends or saves or self.stopping

    def finished(self) -> bool:
        """Whether it ends here; the history gets the reason."""
        patience = self.settings.patience
        if patience is not None and self.epoch - self.best["epoch"] >= patience:
            self.history.stopped = "early"
        elif self.step >= self.settings.steps:
            self.history.stopped = "done"
        elif self.stopping and not self.unchecked:
            self.history.stopped = "asked"
        return self.history.stopped != ""

    # -- what is kept

    def state(self) -> dict[str, state.Tree]:
        """All that the rest of the run depends on, as this process has it."""
        return {
            "place": self.position,
            "settings": asdict(self.settings),
            "best": self.best,
            "before": self.validator.before,
            "deltas": {delta.name: delta.state_dict() for delta in self.deltas},
            "kind": type(self.optimizer).__name__,
            "optimizer": state.optimizer_state(self.optimizer, self.parameter_names),
            "options": self.options,
            "scaler": self.scaler.state_dict(),
            "loss": self.loss_state.state_dict() if self.loss_state else {},
            "contender": self.contender.state() if self.contender else {},
            "random": state.random_state(self.device),
        }

    def resume(self, tree: dict[str, state.Tree]) -> None:
        """Goes on from a checkpoint's state. Raises FileError if it is of other data, too."""
        rank, known, step = self.processes.rank, tree.get("batches"), tree["place"]["step"]
        if step and known is not None:  # earlier checkpoints don't know their data
            self.batches = [batch for batch, _ in self.loader.ahead(step - 1)]
            if self.processes.sum([digest(self.batches) != known[rank]]) != [0]:
                raise FileError(
                    f"the checkpoint's run had another batch at step {step} than the data gives "
                    "now: go on with the data it was begun with (what is drawn there has to come "
                    "from the global generators, which follow from seed), or begin anew in another "
                    "folder"
                )
        loss = tree["loss"][rank] if "loss" in tree else {}  # earlier checkpoints have none
        self.restore({**tree, "random": tree["random"][rank], "loss": loss})

    def restore(self, tree: dict[str, state.Tree]) -> None:
        """Goes back, or on, to a state. Raises FileError if it is of another optimizer."""
        if tree["kind"] != (kind := type(self.optimizer).__name__):
            raise FileError(
                f"the checkpoint is of a run with {tree['kind']}, and the optimizer here is {kind}"
            )
        theirs = {**self.options, **tree.get("options", {})}
        if others := [k for k, own in self.options.items() if theirs[k] != own]:
            differences = listed(f"{k} {theirs[k]}, not {self.options[k]}" for k in others)
            raise FileError(f"the checkpoint's optimizer has {differences}: go on with that")
        state.set_optimizer_state(self.optimizer, tree["optimizer"], self.parameter_names)
        self.step = self.saved_step = tree["place"]["step"]
        self.best, self.validator.before = tree["best"], tree["before"]
        for delta in self.deltas:
            delta.load_state_dict(tree["deltas"][delta.name])
        self.scaler.load_state_dict(tree["scaler"])
        if self.loss_state and tree["loss"]:
            self.loss_state.load_state_dict(tree["loss"])
        if self.contender and tree.get("contender"):
            self.contender.load_state(tree["contender"])
        state.set_random_state(tree["random"], self.device)

    def save(self, store: Checkpoints) -> None:
        """Writes a checkpoint, the first process for all."""
        tree = self.state()
        tree["random"] = self.processes.all_gather(tree["random"])
        tree["loss"] = self.processes.all_gather(tree["loss"])
        tree["batches"] = self.processes.all_gather(digest(self.batches))

        def write() -> None:
            self.log.sync()
            store.write(self.name, self.deltas, tree, self.best["name"])

        self.processes.on_first(write)
        self.saved_step = self.step

    def is_finite(self, losses: Metrics, norm: Tensor, checks: bool) -> bool:
        """Whether the update can be made; between checks it is assumed."""
        finite = losses.loss.isfinite()
        if not self.scaler.is_enabled():  # which leaves out the step, if the gradients aren't
            finite = finite & norm.isfinite()
        self.unchecked.append(finite)
        if not checks:
            return True
        unchecked, self.unchecked = self.unchecked, []
        return bool(torch.stack(unchecked).all())

    def rewind(self, losses: Metrics, norm: Tensor) -> None:
        """Goes back to the last check, to find the step that isn't finite; there, it raises."""
        self.optimizer.zero_grad()
        if self.snapshot is not None:
            self.restore(self.snapshot)
            self.log.drop()
            self.check_every, self.snapshot = 1, None
            return
        written = ""
        if self.store is not None:
            rank = f"-of-{self.processes.rank}" if self.processes.size > 1 else ""
            path = self.store.folder / f"not-finite-{self.step + 1:08d}{rank}.safetensors"
            write_batch(path, self.batches)
            written = f"; its batch is in {str(path)!r}"
        raise PeftliteError(
            f"at step {self.step + 1} the loss is {losses.loss.item():g} and the norm of its "
            f"gradients {norm.item():g}: {self.names} stays "
            f"as after step {self.step}{written}. Look at that batch, or lower lr_multiplier"
        )


def _has_regularizer(delta: Delta) -> bool:
    patches = (placed.patch for placed in delta.placed.values())
    return any(type(patch).regularizer is not Patch.regularizer for patch in patches)
