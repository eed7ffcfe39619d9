"""T4: a byte-level GPT that was trained on Python source is tuned on English documentation.

Text and network are those of `peftlite demo`, the base trained for longer. The documentation that
the demo holds out is cut in two: the first half validates, the second tests. The base is cached.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.patch import Target
from peftlite.demo import gpt, training
from peftlite.demo.text import texts
from peftlite.demo.training import Recipe, pretrain

from .task import Judgement, Split, Task

STEPS = 40
DIM, LAYERS, HEADS, CONTEXT, BATCH = 128, 4, 4, 128, 4
RECIPE = Recipe(steps=2000, lr=2e-3, batch=8, context=CONTEXT)
WINDOWS = 64  # of each text held out


class ByteLM(Task):
    name = "T4 byte LM"
    quality = "bits per byte of documentation"
    less_is_better = True
    version = 1
    batch = BATCH
    rate = 2e-3
    head = "lm_head"
    places: ClassVar[Mapping[str, Target]] = {
        "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "keys": "k_proj",
        "values": "v_proj",
        "down": "mlp.down",
    }

    def __init__(self, cache: Path, quick: bool = False) -> None:
        self.steps = 2 if quick else STEPS
        corpus = texts()
        self.code, docs = corpus["code"], corpus["docs"]
        self.train = docs.train
        self.held = dict(zip(("validation", "test"), docs.held.chunk(2), strict=True))
        recipe = Recipe(steps=20, lr=2e-3) if quick else RECIPE
        key = _key(self.code.train, recipe)
        torch.manual_seed(0)
        self.base = gpt.GPT(DIM, LAYERS, HEADS)
        cache.mkdir(parents=True, exist_ok=True)
        file = cache / f"bytelm-{key}.safetensors"
        pretrain(self.base, self.code.train, recipe, file, key, fresh=False)

    def sample(self, draw: torch.Generator) -> Tensor:
        starts = torch.randint(len(self.train) - CONTEXT, (BATCH,), generator=draw)
        return training.windows(self.train, starts, CONTEXT)

    def losses(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(batch[:, :-1])
        return F.cross_entropy(logits.mT, batch[:, 1:], reduction="none").mean(-1) / math.log(2)

    def judge(self, model: nn.Module, split: Split) -> Judgement:
        bits = training.held_out(model, self.held[split], CONTEXT, WINDOWS)
        return Judgement(bits, bits)

    def own_loss(self, model: nn.Module) -> float:
        return training.held_out(model, self.code.held, CONTEXT, WINDOWS)


def _key(text: Tensor, recipe: Recipe) -> str:
    """A short name for what the base is made of: text, network and training."""
    digest = hashlib.sha256(text.numpy())
    for part in (*map(inspect.getsource, (gpt, training)), (DIM, LAYERS, HEADS), recipe):
        digest.update(repr(part).encode())
    return digest.hexdigest()[:12]
