"""Scaling: y' = l ⊙ y."""

import peftlite as pl
from tests.cards.card import Card, Row

CARDS = (
    Card(
        pl.IA3,
        "map",
        (
            Row("ia3", pl.IA3()),
            Row(
                "ia3_feedforward",
                pl.IA3(feedforward=True),
                refused={"bilinear": "IA3 takes none of this model's sites by default"},
                way="inputs",
            ),
            Row("ia3_rows", pl.IA3(targets=["qkv[q]", "qkv[v]"]), only=("gpt_fused",), way="parts"),
        ),
        golden=pl.IA3(),
        bank="vectors reading",
        peft="IA3",
        rate=10,
    ),
)
