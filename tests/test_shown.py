"""What shows itself: in a notebook as it is printed, safe from what is in a name, in one line."""

import html.parser
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftlite as pl
from peftlite.bank.counts import Counts
from peftlite.core.tree import Tree
from peftlite.table import Shown, Table, table

EVIL = "<b onclick='x'>&amp;</b>"


def model() -> nn.Module:
    """One whose modules have names that HTML would take for its own."""
    return nn.ModuleDict({EVIL: nn.Linear(4, 4), "b": nn.Linear(4, 2)})


def delta() -> pl.Delta:
    return pl.attach(model(), [pl.LoRA(rank=2, targets="weight"), pl.BitFit()], "sql")


def bank() -> pl.DeltaBank:
    own = pl.DeltaBank(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), slots=1, max_rank=2)
    for name in ("sql", "chat"):
        own.load(name, pl.LoRA(rank=2))
    for name in ("sql", "sql", "chat"):
        with own.use(name):
            own.model(torch.randn(3, 4))
    return own


def receipt() -> pl.Receipt:
    attached = model()
    pl.attach(attached, pl.LoRA(rank=2, targets="weight"), "sql")
    return pl.merge(attached, "sql")


def fused() -> pl.Fused:
    attached = nn.ModuleDict({name: nn.Linear(4, 4) for name in (EVIL, "k")})
    pl.attach(attached, pl.LoRA(rank=2, targets="weight"))
    return pl.fuse(attached, groups=[(EVIL, "k")])


def info() -> pl.Info:
    pl.save(delta(), "sql.safetensors", notes={"data": EVIL})
    return pl.inspect("sql.safetensors")


def trainer() -> pl.Trainer:
    attached = nn.Linear(4, 3)
    pl.attach(attached, pl.LoRA(rank=2, targets="weight"), name="sql")
    data = [(torch.randn(4), i % 3) for i in range(12)]
    options = {"epochs": 2, "probes": {EVIL: lambda _: 0.5}, "progress": False}
    return pl.Trainer(attached, pl.losses.classification, data[4:], data[:4], **options)


MODEL = model()
KEPT = pl.attach(MODEL, pl.LoRA(rank=2, targets="weight"), "sql")
TRIAL = pl.Trial(1, {"lr": 0.1, EVIL: EVIL}, "loss", [0.5], "failed", EVIL)


def report() -> pl.data.Report:
    Path("<i>.jsonl").write_text(f'{{"prompt": "{EVIL}"}}\n')
    return pl.data.validate("<i>.jsonl")


SHOWN: dict[type, Callable[[], Any]] = {
    pl.Delta: delta,
    pl.Plan: lambda: pl.plan(model(), pl.LoRA(rank=4, targets="weight")),
    pl.DeltaBank: bank,
    Counts: lambda: bank().counts,
    pl.Receipt: receipt,
    pl.Packs: lambda: pl.quantize(model(), targets="*"),
    pl.Fused: fused,
    pl.Info: info,
    pl.Trainer: trainer,
    pl.History: lambda: trainer().fit(),
    pl.Trial: lambda: TRIAL,
    pl.Trials: lambda: pl.Trials([TRIAL]),
    pl.Forgetting: lambda: pl.forgetting({EVIL: 0.9}, {EVIL: 0.6}),
    pl.data.Report: report,
    Tree: lambda: KEPT.tree(),
    Table: lambda: pl.kernels.report(delta().placed["b.weight"].site.module),
}


class Reader(html.parser.HTMLParser):
    """The words of a page, and the tags that it is made of."""

    def __init__(self, page: str):
        super().__init__()
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.styles: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.styles |= {f"{name}={value}" for name, value in attrs}

    def handle_data(self, data: str) -> None:
        self.words += data.split()


@pytest.mark.parametrize("make", SHOWN.values(), ids=[kind.__name__ for kind in SHOWN])
def test_html_says_what_print_says(
    make: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    thing = make()
    page = Reader(thing._repr_html_())
    assert page.words == [word for word in str(thing).split() if not re.fullmatch("-{2,}", word)]
    assert page.tags <= {"table", "thead", "tbody", "tr", "th", "td", "div"}
    # a notebook's own colours: dark where it is dark
    assert not [style for style in page.styles if "color" in style or "background" in style]


@pytest.mark.parametrize("kind", [kind for kind in SHOWN if kind is not Table])
def test_a_repr_is_a_line(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = repr(SHOWN[kind]())
    assert line.startswith(f"{kind.__name__}(") and "\n" not in line and len(line) < 200


def test_a_site_says_its_address_and_no_module() -> None:
    assert repr(KEPT.placed["b.weight"].site) == "Site('b.weight')"


def test_all_that_shows_itself_is_here() -> None:
    assert {*Shown.__subclasses__()} <= {*SHOWN}


def test_words_are_left_and_numbers_right() -> None:
    cells = [["0.weight", "1.5 KiB", "8×4"], ["10.w", "12 B", "–"]]
    assert table(["site", "size", "shape"], cells).splitlines() == [
        "site         size  shape",
        "--------  -------  -----",
        "0.weight  1.5 KiB    8×4",
        "10.w         12 B      –",
    ]


def test_a_bank_counts_what_batches_find() -> None:
    own = bank()
    counts = own.counts
    assert (counts.hits, counts.misses) == ({"sql": 1, "chat": 0}, {"sql": 1, "chat": 1})
    assert counts.evictions == {"sql": 2, "chat": 1} and counts.hit_rate == 1 / 3
    own.prefetch("sql")
    own.evict("sql")
    own.load("sql", pl.LoRA(rank=1))  # a swap goes on counting
    assert own.counts.hits == counts.hits and own.counts.misses == counts.misses
    assert own.counts.evictions == {"sql": 3, "chat": 2}
