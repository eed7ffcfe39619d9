"""A language model that trains in no time, its data, and trainers of it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.demo.gpt import GPT
from peftlite.train import History, Trainer, losses

LORA = pl.LoRA(rank=2, dropout=0.1, targets=["q_proj", "v_proj"])


def texts(count: int = 12, seed: int = 0) -> list[dict[str, Tensor]]:
    """Examples of different lengths, some tokens without a loss."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        n = int(torch.randint(4, 12, (), generator=draw))
        ids = torch.randint(32, 128, (n,), generator=draw)
        labels = ids.where(torch.rand(n, generator=draw) < 0.8, -100)
        found.append({"input_ids": ids, "labels": labels})
    return found


def gpt(method: Any = LORA, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = GPT(16, 2, 2).to(dtype)
    pl.attach(model, method, "sql")
    return model


def trainer(model: nn.Module | None = None, folder: Path | None = None, **options: Any) -> Trainer:
    given: dict[str, Any] = {
        "train": texts(), "val": texts(4, seed=1), "epochs": 3, "batch_size": 4, "lr": 1e-2,
        "progress": False, "folder": folder, "loss": losses.causal_lm, **options,
    }  # fmt: skip
    return Trainer(gpt() if model is None else model, **given)


def values(model: nn.Module, name: str = "sql") -> dict[str, Tensor]:
    return {key: t.clone() for key, t in pl.deltas(model)[name].state_dict().items()}


def timeless(history: History) -> list[dict[str, Any]]:
    """The events, without what a clock says."""
    clocked = ("tokens_per_second", "memory")
    return [{k: v for k, v in event.items() if k not in clocked} for event in history.events]
