"""One run: a method is attached to a copy of a task's base, trained, measured, and taken off."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from time import thread_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peftlite as pl
from peftlite.demo.training import Recipe

from .methods import Row
from .task import Task

PATIENCE = 2  # looks at the validation split that find nothing better


@dataclass(frozen=True)
class Outcome:
    """What a run says; a run that only tries a learning rate never sees the test split."""

    validation: float = math.nan
    loss: float = math.nan
    quality: float = math.nan
    own_loss: float = math.nan
    parameters: int = 0
    file_bytes: int = 0
    step_ms: float = 0.0  # the median, of the thread's own time: what others take doesn't count
    step_bytes: int = 0  # the most that a step holds beyond the weights of base and delta
    error: str = ""  # why the method can't serve the task


def run(task: Task, row: Row, rate: float, seed: int, final: bool) -> Outcome:
    """Trains for the task's steps. Raises PeftliteError if the method can't serve the task."""
    torch.manual_seed(seed)
    model = copy.deepcopy(task.base)
    methods = row.methods(task)
    if not methods:
        return Outcome(*_judged(task, model, final))
    delta = pl.attach(model, methods)
    trainer = Trainer(task, model, delta, row.b_ratio, rate, seed)
    times = trainer.train_until_no_better() if task.look else trainer.train(task.steps)
    judged = _judged(task, model, final)
    if not final:
        return Outcome(*judged)
    cost = (
        delta.num_parameters,
        _file_bytes(delta),
        1000 * statistics.median(times),
        trainer.step_bytes(),
    )
    pl.detach(model, delta.name)
    if any(not torch.equal(w, model.state_dict()[k]) for k, w in task.base.state_dict().items()):
        raise RuntimeError(f"{row.name} left a base on {task.name} that isn't what it was")
    return Outcome(*judged, *cost)


class Trainer:
    """The same for every method: AdamW without weight decay, a cosine to zero, gradients clipped.

    Where training ends when validation gets no better, the rate is constant instead. The batches of
    a seed are the same too.
    """

    def __init__(
        self, task: Task, model: nn.Module, delta: pl.Delta, b_ratio: float, rate: float, seed: int
    ) -> None:
        self.task, self.model, self.delta = task, model, delta
        self.draw = torch.Generator().manual_seed(seed)
        self.adamw = torch.optim.AdamW(delta.parameter_groups(rate, b_ratio), weight_decay=0.0)
        pace = (lambda step: 1.0) if task.look else Recipe(task.steps, rate).pace
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adamw, pace)

    def train(self, steps: int) -> list[float]:
        """Trains; returns the seconds of each step."""
        self.model.train()
        times = [self.step() for _ in range(steps)]
        self.model.eval()
        return times

    def train_until_no_better(self) -> list[float]:
        """Trains until looks at the validation split find nothing better; keeps what was best."""
        times: list[float] = []
        least, since, best = math.inf, 0, self._state()
        while len(times) < self.task.steps and since < PATIENCE:
            times += self.train(self.task.look)
            loss = self.task.judge(self.model, "validation").loss
            since += 1
            if loss < least:
                least, since, best = loss, 0, self._state()
        self.delta.load_state_dict(best)
        return times

    def _state(self) -> dict[str, Tensor]:
        return {name: x.clone() for name, x in self.delta.state_dict().items()}

    def step(self) -> float:
        """Trains on one batch; returns the seconds that it took."""
        batch = self.task.sample(self.draw)
        began = thread_time()
        loss = self.task.losses(self.model, batch).mean() + self.delta.regularizer()
        loss.backward()
        nn.utils.clip_grad_norm_(self.delta.parameters(), 1.0)
        self.adamw.step()
        self.delta.step()
        self.adamw.zero_grad()
        took = thread_time() - began
        self.schedule.step()
        return took

    def step_bytes(self) -> int:
        """The most bytes that a step holds, and those of the optimizer's state."""
        self.model.train()
        with Peak() as peak:
            self.step()
        return peak.most + sum(_storage(x).nbytes() for x in tensors(self.adamw.state_dict()))


class Peak(TorchDispatchMode):
    """Counts the bytes that operations allocate for their results, while those are alive.

    It doesn't see what a kernel takes for itself, and doesn't depend on the allocator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(_storage(x)) for x in tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in map(_storage, tensors(result)):
            key = id(storage)
            if key not in given and key not in self.alive:
                self.alive.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _freed(self, key: int, count: int) -> None:
        self.alive.remove(key)
        self.now -= count


def tensors(tree: Any) -> list[Tensor]:
    """Those of a tree; of a sparse one what it is made of."""
    found = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [part for tensor in found for part in _parts(tensor)]


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.layout is torch.sparse_csr:
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return (tensor,)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _judged(task: Task, model: nn.Module, final: bool) -> tuple[float, ...]:
    """The first fields of an outcome."""
    validation = task.judge(model, "validation").loss
    if not final:
        return (validation,)
    return validation, *task.judge(model, "test"), task.own_loss(model)


def _file_bytes(delta: pl.Delta) -> int:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "delta.safetensors"
        pl.save(delta, file)
        return file.stat().st_size
