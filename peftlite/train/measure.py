"""Measuring: losses added up where they are computed, a validation set, probes, memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from peftlite.errors import PeftliteError
from peftlite.table import short
from peftlite.train.loader import Loader
from peftlite.train.modes import evaluating
from peftlite.train.parallel import Processes
from peftlite.train.state import fork_rng

Loss = Callable[[nn.Module, Any], Any]


def check_loss(loss: Any) -> None:
    """Raises PeftliteError for one of torch's, which compares an output with labels."""
    kind = loss if isinstance(loss, type) else type(loss)
    if not issubclass(kind, _Loss) and getattr(loss, "__module__", "") != F.__name__:
        return
    name = getattr(loss, "__name__", kind.__name__)
    known = {"CrossEntropyLoss": "classification", "cross_entropy": "classification",
             "MSELoss": "regression", "mse_loss": "regression"}  # fmt: skip
    ready = f"pl.losses.{known[name]}, or " if name in known else ""
    call = f"{name}()" if isinstance(loss, _Loss | type) else name
    raise PeftliteError(
        f"{name} compares an output with labels, and a loss here is a function of (model, batch): "
        f"give {ready}lambda model, batch: {call}(model(batch[0]), batch[1])"
    )


def best_of(metric: str) -> Any:
    """`min` or `max`: what gives the best of a metric's values, by its name."""
    return min if metric.endswith(("loss", "perplexity")) else max


class Metrics:
    """What a loss function gave for some batches: sums that stay on the device."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.parts: list[Tensor] = []

    def add(self, output: Any, examples: int) -> tuple[Tensor, Tensor]:
        """Adds a batch; gives its mean loss, and the count that this is the mean over.

        Args:
            output: of the loss function, a tensor or a dict.
            examples: of the batch; 0 for a stand-in.
        """
        given = dict(output) if isinstance(output, Mapping) else {"loss": output}
        if not examples:
            given |= dict.fromkeys({"count", "correct"} & given.keys(), 0)
        loss = given.pop("loss", None)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise PeftliteError(
                "a loss is a function of (model, batch) that gives a tensor of one number, or a "
                f"dict with it as 'loss': not {short(output)}"
            )
        loss = loss.reshape(())
        dtype = torch.promote_types(loss.dtype, torch.float32)

        def number(value: Any) -> Tensor:
            if isinstance(value, Tensor):
                return value.detach().to(loss.device, dtype)
            return torch.full((), value, dtype=dtype, device=loss.device)  # no copy to wait for

        count = number(given.pop("count", examples))
        sums = {"count": count, "loss": number(loss) * count}
        if "correct" in given:
            sums["correct"] = number(given.pop("correct"))
        sums |= {name: number(value) * count for name, value in given.items()}
        self.names = list(sums)
        self.parts.append(torch.stack(list(sums.values())))
        return loss, count

    def all_reduce(self, processes: Processes) -> Metrics:
        """Adds the sums of the other processes. Raises PeftliteError for other fields there."""
        if processes.size > 1:
            processes.check_fields(self.names)
            self.parts = [torch.stack(self.parts).sum(0)]
            processes.all_reduce(self.parts)
        return self

    @property
    def count(self) -> Tensor:
        """What the mean loss is over, on the device."""
        return torch.stack(self.parts)[:, 0].sum()

    @property
    def loss(self) -> Tensor:
        """The mean loss, on the device."""
        sums = torch.stack(self.parts).sum(0)
        return sums[1] / sums[0].clamp(min=1e-12)

    def means(self, prefix: str) -> dict[str, float]:
        """All of it as means. The host waits for the device here."""
        totals = torch.stack(self.parts).cpu().double().sum(0).tolist()
        sums = dict(zip(self.names, totals, strict=True))
        count = sums.pop("count") or 1.0
        correct = sums.pop("correct", None)
        means = {f"{prefix}_{name}": total / count for name, total in sums.items()}
        if correct is not None:
            means[f"{prefix}_mean_token_accuracy"] = correct / count
        return means


@dataclass(eq=False)
class Validator:
    """What a model can do: the loss of a validation set, and probes of earlier skills.

    Args:
        model: the user's, for probes.
        wrapped: what is trained, for losses.
        val: None without a validation set.
        every: steps between losses on one batch of it; None for none.
        before: the probes' scores before training.
    """

    model: nn.Module
    wrapped: nn.Module
    loss: Loss
    val: Loader | None
    every: int | None
    probes: Mapping[str, Callable[[nn.Module], float]]
    device: torch.device
    processes: Processes
    before: dict[str, float] = field(default_factory=dict)

    def validate(self) -> dict[str, float]:
        """All of the validation set, and the probes. The host waits for the device."""
        found: dict[str, float] = {}
        if self.val is not None:
            metrics = self._metrics(self.val.epoch())
            found = metrics.means("full_valid")
            if "correct" in metrics.names:
                found["full_valid_perplexity"] = math.exp(min(found["full_valid_loss"], 700))
        return found | self._probed() if self.probes else found

    def _probed(self) -> dict[str, float]:
        found: dict[str, float] = {}
        with torch.no_grad(), fork_rng(self.device), evaluating(self.model):
            for name, probe in self.probes.items():
                score = _score(name, probe(self.model))
                # a probe that draws at random gives each process another score
                found[name] = self.processes.broadcast(score)
                self.before.setdefault(name, found[name])
                found[f"{name} forgotten"] = self.before[name] - found[name]
        return found

    def validate_batch(self, step: int) -> dict[str, Metrics]:
        """The next batch of the validation set, if one is due after a step."""
        if self.val is None or not self.every or step % self.every:
            return {}
        number = (step // self.every - 1) % self.val.steps_per_epoch
        return {"valid": self._metrics(self.val.micro_batches(number))}

    def _metrics(self, batches: Iterable[tuple[Any, int]]) -> Metrics:
        found = Metrics()
        with torch.no_grad(), fork_rng(self.device), evaluating(self.wrapped):
            for batch, examples in batches:
                found.add(self.loss(self.wrapped, batch), examples)
        return found.all_reduce(self.processes)


def _score(name: str, given: Any) -> float:
    try:
        return float(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PeftliteError(f"probe {name!r} is to give a number, not {short(given)}") from error


def count_tokens(batch: Any, examples: int) -> int:
    """The tokens of a batch, padding among them; its examples where there are no `input_ids`."""
    if not examples:
        return 0
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ids.numel() if isinstance(ids, Tensor) else examples


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held so far: on the device, or by the process where that is the CPU."""
    if device.type != "cpu":
        most = getattr(torch.get_device_module(device), "max_memory_allocated", None)
        return None if most is None else most()
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
