"""Training on the next byte, once for the base; and the loss on text that was held out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peftlite.io.files import write_file
from peftlite.progress import bar


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train; `batch` windows of `context` bytes a step."""

    steps: int
    lr: float
    batch: int = 4
    context: int = 128
    warmup: float = 0.05  # of the steps
    weight_decay: float = 0.1
    max_norm: float = 1.0
    seed: int = 0

    def pace(self, step: int) -> float:
        """The learning rate at a step as a share of `lr`: a linear rise, then a cosine to zero."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (self.steps - rise))


def train(
    model: nn.Module, parameters: Iterable[nn.Parameter], text: Tensor, recipe: Recipe, label: str
) -> None:
    """Trains `parameters`, which may be all of the model's or a delta's, on random windows."""
    parameters = list(parameters)
    draw = torch.Generator().manual_seed(recipe.seed)
    adamw = torch.optim.AdamW(
        parameters, recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, recipe.pace)
    steps = bar(range(recipe.steps), label, unit="step")
    for _ in steps:
        starts = torch.randint(len(text) - recipe.context, (recipe.batch,), generator=draw)
        loss = bits(model, windows(text, starts, recipe.context))
        adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.max_norm)
        adamw.step()
        schedule.step()
        steps.set_postfix_str(f"{loss.item():.2f} bits per byte", refresh=False)


def pretrain(
    model: nn.Module, text: Tensor, recipe: Recipe, path: Path, key: str, fresh: bool
) -> None:
    """Fills the model from the file, if that is whole and was made for `key`; else trains it."""
    state = None if fresh else _read(path, key)
    if state is None:
        train(model, model.parameters(), text, recipe, "pretrain the base")
        state = model.state_dict()
        write_file(path, state, {"stamp": _stamp(key, state)})
    else:
        model.load_state_dict(state)


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """What was written there; none if the file is missing, damaged, or another's."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            stamp = (file.metadata() or {}).get("stamp")
    except (OSError, SafetensorError):
        return None
    return state if stamp == _stamp(key, state) else None


def _stamp(key: str, state: dict[str, Tensor]) -> str:
    """A hash of the weights and of what they were made from."""
    digest = hashlib.sha256(key.encode())
    for name in sorted(state):
        digest.update(f"{name} {tuple(state[name].shape)}".encode())
        digest.update(state[name].numpy())
    return digest.hexdigest()


@torch.no_grad()
def held_out(model: nn.Module, text: Tensor, context: int, count: int) -> float:
    """Bits per byte on `count` windows spread evenly over a text."""
    starts = torch.linspace(0, len(text) - context - 1, count).long()
    total = sum(
        len(part) * bits(model, windows(text, part, context)).item() for part in starts.split(32)
    )
    return total / count


def windows(text: Tensor, starts: Tensor, context: int) -> Tensor:
    """(b, context + 1) bytes: each is predicted from those before it."""
    return text[starts[:, None] + torch.arange(context + 1)].long()


def bits(model: nn.Module, window: Tensor) -> Tensor:
    """The loss, in bits per byte."""
    logits = model(window[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()) / math.log(2)
