"""A step through the Trainer against a step of a loop written by hand: LoRA on a small Llama.

Both have the same batches, AdamW, clipping and cosine. The Trainer's counts tokens that were right,
checks every loss and norm, and tells of every step; the other does nothing beyond what trains.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from time import thread_time

import torch
import torch.nn.functional as F
import transformers
from common import Figure, arguments, interleave, ratios, report
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import peftlite as pl
from peftlite.train import Trainer, losses
from peftlite.train.data import collate

VOCABULARY, BATCH, TOKENS, RATE = 8192, 4, 128, 1e-3
Data = list[dict[str, Tensor]]


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    pl.attach(model, pl.LoRA(rank=8), "sql")
    return model


def texts(count: int) -> Data:
    ids = torch.randint(VOCABULARY, (count, TOKENS))
    return [{"input_ids": row, "labels": row} for row in ids]


def by_hand(model: nn.Module, data: Data) -> float:
    """Seconds of a step."""
    parameters = list(pl.deltas(model)["sql"].parameters())
    adamw = torch.optim.AdamW(parameters, RATE, weight_decay=0.01, fused=True)
    steps = len(data) // BATCH
    schedule = LambdaLR(adamw, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    model.train()
    began = thread_time()
    for batch in DataLoader(data, BATCH, shuffle=True, collate_fn=collate):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        schedule.step()
        adamw.zero_grad()
    return (thread_time() - began) / steps


def through(model: nn.Module, data: Data, folder: Path | None) -> float:
    """Seconds of a step, with all that `fit` does around them."""
    trainer = Trainer(
        model, losses.causal_lm, data, epochs=1, batch_size=BATCH, lr=RATE, warmup=0.0,
        folder=folder, progress=False,
    )  # fmt: skip
    began = thread_time()
    trainer.fit()
    return (thread_time() - began) * BATCH / len(data)


def on_disk(model: nn.Module, data: Data) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return through(model, data, Path(folder))


def main() -> None:
    quick = arguments(__doc__).quick
    rounds, steps = (2, 2) if quick else (9, 10)
    torch.set_num_threads(1)
    model, data = llama(), texts(steps * BATCH)
    times = interleave(
        {
            "by hand": lambda: by_hand(model, data),
            "Trainer": lambda: through(model, data, None),
            "Trainer, on disk": lambda: on_disk(model, data),
        },
        rounds,
    )
    hand = times["by hand"]
    report(
        "trainer_overhead",
        [
            *(Figure(name, [1000 * s for s in each], "ms") for name, each in times.items()),
            Figure("Trainer / by hand", ratios(times["Trainer"], hand), at_most=1.02),
            Figure("Trainer, on disk / by hand", ratios(times["Trainer, on disk"], hand)),
        ],
        quick=quick,
        transformers=transformers.__version__,
    )


if __name__ == "__main__":
    main()
