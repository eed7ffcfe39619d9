"""Few reviews: so many good and bad ones to learn from, others for every seed.

What reviews.py says of data and packages holds; MiniLM's upper two layers are tuned. Neutral
reviews are left out, since there are 54 to train on. Both classes count alike, however many reviews
they have: the figure is the mean of their recalls, a half by chance. A run ends when validation
gets no better. What the lower layers make of the texts is computed once, as in T1.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .minilm import UPPER, Given
from .reviews import CLASSES, Reader, Reviews, Texts, by_length
from .task import Judgement, Split, Task

STEPS, BATCH = 160, 8
SHOTS = (8, 16, 32, 64)
VALIDATION = 60  # of each class
EXTREMES = CLASSES.index("negative"), CLASSES.index("positive")


class Upper(Reader):
    """Takes what the lower layers made, in place of tokens."""

    def mean(self, texts: Texts) -> Tensor:
        h = self.encoder(inputs_embeds=texts.tokens, attention_mask=texts.mask).last_hidden_state
        return (h * texts.mask[..., None]).sum(1) / texts.mask.sum(1, keepdim=True)


class Few(Reviews):
    quality = "mean recall of good and bad reviews"
    version = 2
    batch = BATCH
    rate = 2.5e-4
    look = 20
    shots: ClassVar[int]

    def __init__(self, cache: Path, quick: bool = False) -> None:
        vars(self).update(vars(_above(quick)))
        self.steps = 2 if quick else STEPS

    def drawn(self, seed: int) -> Task:
        task = copy.copy(self)
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train.of), generator=draw)
        task.train = self.train.pick(first_of_each(self.train.of, self.shots, order))
        return task

    def sample(self, draw: torch.Generator) -> Texts:
        return self.train.pick(torch.randperm(len(self.train.of), generator=draw)[:BATCH])

    @torch.no_grad()
    def judge(self, model: nn.Module, split: Split) -> Judgement:
        texts = self.held[split]
        logits = by_length(model, texts)
        losses = F.cross_entropy(logits, texts.of, reduction="none")
        right = (logits.argmax(-1) == texts.of).float()
        of_class = [texts.of == i for i in range(len(EXTREMES))]
        loss, recall = (
            torch.stack([x[c].mean() for c in of_class]).mean() for x in (losses, right)
        )
        return Judgement(loss.item(), recall.item())


@functools.cache
def _above(quick: bool) -> Reviews:
    """The task above the lower layers, of good and bad reviews."""
    task = Reviews(Path(), quick)
    encoder = task.base.encoder
    layers = encoder.encoder.layer
    encoder.encoder.layer = layers[:-UPPER]
    task.topics = [_made(encoder, texts) for texts in task.topics]
    known = Texts(*map(torch.cat, zip(task.held["validation"], task.train, strict=True)))
    known, test = (_made(encoder, _extreme(texts)) for texts in (known, task.held["test"]))
    order = torch.arange(len(known.of))
    held = first_of_each(known.of, 5 if quick else VALIDATION, order)
    task.held = {"validation": known.pick(held), "test": test}
    task.train = known.pick(order[~torch.isin(order, held)])
    encoder.embeddings, encoder.encoder.layer = Given(), layers[-UPPER:]
    task.base = Upper(encoder, len(EXTREMES))
    return task


def first_of_each(of: Tensor, count: int, order: Tensor) -> Tensor:
    """The first so many of each class that an order of the texts has."""
    return torch.cat([order[of[order] == one][:count] for one in of.unique()])


def _extreme(texts: Texts) -> Texts:
    """Those that are negative, which is 0 now, or positive, 1."""
    chosen = texts.pick(torch.isin(texts.of, torch.tensor(EXTREMES)).nonzero()[:, 0])
    return chosen._replace(of=(chosen.of == EXTREMES[1]).long())


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
