"""delta.tree: where the patches sit, what is folded, and the counts, on every kind of model."""

import re
from typing import Any

import pytest
from torch import nn

import peftlite as pl
from tests.zoo import KINDS, Kind

METHOD = [pl.LoRA(rank=2, targets="*"), pl.BitFit(targets="bias")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_it_counts_what_is_there(kind: Kind) -> None:
    model = kind.model()
    base = sum(p.numel() for p in model.parameters())
    delta = pl.attach(model, pl.FullTuning(), "sql")
    top, *rows = delta.tree()._repr_html_().split("<tr>")[2:]
    assert f">{base:,}<" in top and f">{delta.num_parameters:,}<" in top
    assert all("frozen" not in row or "+ FullTuning" not in row for row in rows)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)


class Model(nn.Module):
    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


def test_it_folds_blocks_that_are_alike() -> None:
    model = Model()
    delta = pl.attach(model, pl.LoRA(rank=2, targets="up"), "sql").requires_grad_(False)
    assert str(delta.tree()) == WHERE


WHERE = """\
delta 'sql': chosen, frozen, 96 parameters
module         what                     base   delta  state
-------------  ---------------------  ------  ------  ------
model          Model                     344      96
├ embed        Embedding                  40          frozen
├ blocks.0-3   4 × Block              4 × 76  4 × 24
│ ├ up.weight  Linear + LoRA(rank=2)      40      24  frozen
│ └ down       Linear                     36          frozen
└ head         Linear                     40          frozen"""


def test_it_folds_those_alone() -> None:
    methods = [pl.LoRA(rank=1, targets=["blocks.1.up", "blocks.3.up"]), pl.BitFit(targets="down")]
    model = Model(6)
    delta = pl.attach(model, [*methods, pl.IA3(targets="embed")], "sql")
    lines = [re.split(r"(?<=[\w)\]])  ", line)[0] for line in str(delta.tree()).splitlines()[3:]]
    assert lines == [
        "model", "├ embed.weight", "├ blocks", "│ ├ 0,2,4-5", "│ │ ├ up", "│ │ └ down.bias",
        "│ └ 1,3", "│   ├ up.weight", "│   └ down.bias", "└ head.weight",
    ]  # fmt: skip
    assert "Linear = embed.weight" in str(delta.tree())


@pytest.mark.parametrize(
    ("act", "state"),
    [
        (lambda model: None, "chosen, trains"),
        (lambda model: pl.use(model, None), "not chosen, trains"),
        (lambda model: pl.merge(model, "sql"), "merged, trains"),
        (lambda model: pl.deltas(model)["sql"].requires_grad_(False), "chosen, frozen"),
    ],
)
def test_it_says_what_the_delta_is_about(act: Any, state: str) -> None:
    model = Model()
    delta = pl.attach(model, pl.LoRA(rank=2, targets="up"), "sql")
    act(model)
    assert delta.tree().head == f"delta 'sql': {state}, 96 parameters"


def test_parts_and_calls_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    parts = pl.LoRA(rank=1, targets=["0.weight[0:4]", "0.weight[4:8]"])
    delta = pl.attach(model, [parts, pl.BottleneckAdapter(targets="1")], "sql")
    lines = [re.split(r"(?<=[\w)\]])  ", line)[0] for line in str(delta.tree()).splitlines()[4:]]
    assert lines == ["├ 0", "│ ├ weight[0:4]", "│ └ weight[4:8]", "└ 1()"]
