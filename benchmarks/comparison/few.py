"""Few reviews: so many of each class to learn from, others for every seed.

What reviews.py says of data and packages holds; MiniLM's upper two layers are tuned. Classes count
alike, however many reviews they have: the figure is the mean of their recalls, a third by chance.
What the lower layers make of the texts is computed once, as in T1.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .minilm import UPPER, Given
from .reviews import CLASSES, Reader, Reviews, Texts, by_length
from .task import Judgement, Split, Task

STEPS = 30
SHOTS = (8, 16, 32, 64)


class Upper(Reader):
    """Takes what the lower layers made, in place of tokens."""

    def mean(self, texts: Texts) -> Tensor:
        h = self.encoder(inputs_embeds=texts.tokens, attention_mask=texts.mask).last_hidden_state
        return (h * texts.mask[..., None]).sum(1) / texts.mask.sum(1, keepdim=True)


class Few(Reviews):
    quality = "mean recall of three classes"
    version = 1
    shots: ClassVar[int]

    def __init__(self, cache: Path, quick: bool = False) -> None:
        vars(self).update(vars(_above(quick)))
        self.steps = 2 if quick else STEPS

    def drawn(self, seed: int) -> Task:
        return self.few(self.shots, seed)

    @torch.no_grad()
    def judge(self, model: nn.Module, split: Split) -> Judgement:
        texts = self.held[split]
        logits = by_length(model, texts)
        losses = F.cross_entropy(logits, texts.of, reduction="none")
        right = (logits.argmax(-1) == texts.of).float()
        of_class = [texts.of == i for i in range(len(CLASSES))]
        loss, recall = (
            torch.stack([x[c].mean() for c in of_class]).mean() for x in (losses, right)
        )
        return Judgement(loss.item(), recall.item())


@functools.cache
def _above(quick: bool) -> Reviews:
    """The task above the lower layers."""
    task = Reviews(Path(), quick)
    encoder = task.base.encoder
    layers = encoder.encoder.layer
    encoder.encoder.layer = layers[:-UPPER]
    made = [_made(encoder, texts) for texts in (task.train, *task.topics)]
    task.held = {split: _made(encoder, texts) for split, texts in task.held.items()}
    task.train, *task.topics = made
    encoder.embeddings, encoder.encoder.layer = Given(), layers[-UPPER:]
    task.base = Upper(encoder)
    return task


@torch.no_grad()
def _made(encoder: nn.Module, texts: Texts) -> Texts:
    parts = zip(texts.tokens.split(50), texts.mask.split(50), strict=True)
    h = [encoder(input_ids=ids, attention_mask=mask).last_hidden_state for ids, mask in parts]
    return texts._replace(tokens=torch.cat(h))


def _of(count: int) -> type[Few]:
    class Shots(Few):
        name = f"Reviews, {count} a class"
        shots = count

    return Shots


FEW = {f"R{count}": _of(count) for count in SHOTS}
