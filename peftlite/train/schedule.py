"""The optimizer's parameter groups, and the learning rate from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from peftlite.core.delta import Delta
from peftlite.train.adamw import AdamW

Schedule = Literal["cosine", "linear", "constant"]
DECLINES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: 0.5 + 0.5 * math.cos(math.pi * x),
    "linear": lambda x: 1 - x,
    "constant": lambda x: 1.0,
}


def lr_factor(step: int, total_steps: int, warmup: float, schedule: Schedule) -> float:
    """The learning rate of a step, counted from 0, as a share of its peak.

    It rises linearly over the first `warmup` of the steps, then declines towards 0 at the end.
    """
    rise = round(warmup * total_steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return DECLINES[schedule]((step - rise) / (total_steps - rise))


def parameter_groups(
    deltas: Iterable[Delta], lr: float, b_ratio: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The trainable parameters of deltas for an optimizer: only matrices decay."""
    found = []
    for group in (group for delta in deltas for group in delta.parameter_groups(lr, b_ratio)):
        trainable = [p for p in group["params"] if p.requires_grad]
        matrices = [p for p in trainable if p.dim() > 1]
        vectors = [p for p in trainable if p.dim() < 2]
        for params, decay in ((matrices, weight_decay), (vectors, 0.0)):
            if params:
                found.append({**group, "params": params, "weight_decay": decay})
    return found


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW, in one kernel where torch has it: a delta is many small tensors."""
    parameters = [p for group in groups for p in group["params"]]
    return AdamW(groups, fused=all(p.device.type in ("cpu", "cuda") for p in parameters))
