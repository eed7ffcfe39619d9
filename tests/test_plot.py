"""pl.plot: what is drawn, not how; and that it leaves pyplot, and who doesn't plot, alone."""

import math
import subprocess
import sys
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor, nn

import peftlite as pl
from peftlite.plot.drawing import COLOURS
from peftlite.verbs.measure import effective_rank, sizes
from tests.zoo import KINDS

ZOO = {kind.name: kind for kind in KINDS}


def trained(kind: str, **methods: Any) -> nn.Module:
    """A model with deltas that change something, by name."""
    model = ZOO[kind].model()
    generator = torch.Generator().manual_seed(0)
    for name, method in methods.items():
        for parameter in pl.attach(model, method, name).parameters():
            parameter.data.normal_(generator=generator)
    return model


def changes(model: nn.Module, delta: pl.Delta) -> dict[str, Tensor]:
    """ΔW of each site, by merging it."""
    before = {a: placed.site.tensor.detach().double() for a, placed in delta.placed.items()}
    pl.merge(model, delta)
    after = {a: placed.site.tensor.detach().double() for a, placed in delta.placed.items()}
    pl.unmerge(model, delta)
    return {address: after[address] - before[address] for address in before}


def line(ax: Any, label: str) -> list[tuple[float, float]]:
    [found] = [each for each in ax.lines if each.get_label() == label]
    return [*zip(*found.get_data(), strict=True)]


# -- measured


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("gpt", pl.LoRA(rank=4, alpha=2)),
        ("gpt", pl.LoRA(rank=2, targets="*.q_proj.weight[0:4]")),
        ("gpt", pl.DoRA(rank=2)),
        ("experts", pl.LoRA(rank=2)),
        ("conv2d_grouped", pl.LoRA(rank=2)),
        ("conv3d", pl.LoHa(rank=2)),
        ("gpt", [pl.BitFit(), pl.FullTuning(targets="embed")]),
    ],
)
def test_sizes_are_those_of_what_a_merge_writes(kind: str, method: Any) -> None:
    model = trained(kind, sql=method)
    delta = pl.deltas(model)["sql"]
    for address, change in changes(model, delta).items():
        size, site = sizes(delta)[address], delta.placed[address].site
        assert size.norm == pytest.approx(float(change.norm()), rel=1e-4)
        if change.dim() == 1:
            assert size.rank is None
            continue
        ranks = []
        matrices = site.layout.matrices(change)
        for matrix in matrices.reshape(-1, *matrices.shape[-2:]):
            s = np.linalg.svd(matrix.numpy(), compute_uv=False)
            p = (s / s.sum())[s > 1e-6 * s.max()]
            ranks.append(math.exp(-(p * np.log(p)).sum()))
        assert size.rank == pytest.approx(np.mean(ranks), rel=1e-3)


def test_effective_rank_counts_directions() -> None:
    s = torch.tensor([[1.0, 1, 1, 0], [3, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    assert effective_rank(s).tolist() == pytest.approx([3, 1, 0])


# -- drawn


def test_change_has_a_line_for_each_kind_and_a_point_for_each_layer() -> None:
    model = trained("gpt", sql=[pl.LoRA(rank=2), pl.FullTuning(targets="lm_head")])
    delta = pl.deltas(model)["sql"]
    ax = pl.plot.change(delta)
    norms, ranks = ax.figure.axes
    assert norms is ax and (norms.get_ylabel(), ranks.get_ylabel()) == ("‖ΔW‖", "effective rank")
    found = sizes(delta)
    for i in range(2):
        own = found[f"blocks.{i}.attn.q_proj.weight"]
        assert line(norms, "attn.q_proj.weight")[i] == (i, own.norm)
        assert line(ranks, "attn.q_proj.weight")[i] == (i, own.rank)
    assert line(norms, "weight") == [(2, found["lm_head.weight"].norm)]
    names = [label.get_text() for label in ranks.get_xticklabels()]
    assert names == ["blocks.0", "1", "lm_head"]


def test_a_line_breaks_between_what_is_not_a_stack() -> None:
    model = nn.ModuleDict({n: nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for n in "ab"})
    delta = pl.attach(model, pl.LoRA(rank=1, targets="weight"), "sql")
    [drawn] = pl.plot.change(delta).lines
    assert drawn.get_xdata().tolist() == [0, 1, 1, 2, 3]
    assert np.isnan(drawn.get_ydata()).tolist() == [False, False, True, False, False]


def test_similarity_is_the_cosine_of_what_a_merge_writes() -> None:
    methods = {"a": pl.LoRA(rank=2), "b": pl.DoRA(rank=2, targets="q_proj"), "c": pl.LoRA(rank=1)}
    model = trained("gpt", **methods, d=pl.FullTuning(), e=pl.LoRA(rank=2, targets="0.mlp"))
    pl.attach(model, pl.LoRA(), "fresh")
    deltas = pl.deltas(model)
    flat = [changes(model, delta) for delta in deltas.values()]
    keys = flat[3]
    rows = torch.stack(
        [torch.cat([(each.get(k, 0 * w)).flatten() for k, w in keys.items()]) for each in flat]
    )
    cosines = nn.functional.cosine_similarity(rows[:, None], rows, dim=-1)
    cosines[5] = cosines[:, 5] = math.nan
    ax = pl.plot.similarity(deltas)
    np.testing.assert_allclose(ax.images[0].get_array().filled(math.nan), cosines, atol=1e-5)
    assert [label.get_text() for label in ax.get_xticklabels()] == [*deltas]
    assert [text.get_text() for text in ax.texts[:1]] == ["1.00"] and ax.texts[-1].get_text() == "–"


def history() -> pl.History:
    model, data = nn.Linear(4, 3), [(torch.randn(4), i % 3) for i in range(12)]
    pl.attach(model, pl.LoRA(rank=2, targets="weight"))
    options: dict[str, Any] = {"epochs": 3, "batch_size": 4, "progress": False, "valid_every": 1}
    loss, probes = pl.losses.classification, {"old": lambda _: 0.5}
    return pl.Trainer(model, loss, data[4:], data[:4], probes=probes, **options).fit()


def test_history_has_losses_and_below_them_accuracies_and_probes() -> None:
    run = history()
    ax = pl.plot.history(run)
    losses, accuracies, scores = ax.figure.axes
    assert losses is ax
    assert line(losses, "training") == run.curves["train_loss"]
    assert line(losses, "validation") == run.curves["full_valid_loss"]
    assert [e["full_valid_loss"] for e in run.epochs] == [y for _, y in line(ax, "validation")]
    assert line(accuracies, "validation, one batch") == run.curves["valid_mean_token_accuracy"]
    assert [each.get_label() for each in scores.lines] == ["old"]


def test_quality_joins_what_nothing_smaller_beats() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    plan = pl.plan(model, pl.BitFit())
    results = {"bias": (plan, 0.7), "poor": (64, 0.6), "good": (100, 0.9), "<b>": (200, 0.8)}
    ax = pl.plot.quality(results, metric="accuracy")
    front, *points = ax.lines
    assert [*zip(*front.get_data(), strict=True)] == [(10, 0.7), (100, 0.9)]
    assert [(*map(float, p.get_xdata()), *p.get_ydata()) for p in points] == [
        (10, 0.7), (64, 0.6), (100, 0.9), (200, 0.8)
    ]  # fmt: skip
    assert [text.get_text() for text in ax.texts] == [*results]
    ax = pl.plot.quality(results, lower=True)
    assert ax.lines[0].get_xdata().tolist() == [10, 64]


def test_bank_has_bars_of_what_it_counts() -> None:
    own = pl.DeltaBank(nn.Linear(4, 4), slots=1, max_rank=2)
    for name in ("sql", "chat"):
        own.load(name, pl.LoRA(rank=2))
    for name in ("chat", "chat", "sql"):
        with own.use(name):
            own.model(torch.randn(3, 4))
    ax = pl.plot.bank(own)
    widths = [[bar.get_width() for bar in bars] for bars in ax.containers]
    assert widths == [[2, 0], [0, 1], [1, 1]]
    assert [bar.get_x() for bar in ax.containers[1]] == [2, 0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["chat", "sql"]
    assert ax.get_title() == "hits 2, misses 1, evictions 2; 66.7% hits"


def test_a_bank_of_many_deltas_sums_the_least_named() -> None:
    own = pl.DeltaBank(nn.Linear(4, 4), slots=2, max_rank=2)
    for i in range(30):
        own.load(f"d{i}", pl.LoRA(rank=1))
    ax = pl.plot.bank(own)
    assert len(ax.get_yticks()) == 25 and ax.get_yticklabels()[-1].get_text() == "6 others"


# -- beside what is there


DRAW = {
    "history": lambda ax: pl.plot.history(history(), ax=ax),
    "change": lambda ax: pl.plot.change(pl.deltas(MODEL)["sql"], ax),
    "similarity": lambda ax: pl.plot.similarity([*pl.deltas(MODEL).values()], ax),
    "quality": lambda ax: pl.plot.quality({"a": (1, 0.5)}, ax),
    "bank": lambda ax: pl.plot.bank(pl.DeltaBank(nn.Linear(4, 4), 2, 2), ax),
}
MODEL = nn.Linear(4, 4)
pl.attach(MODEL, pl.LoRA(rank=2, targets="weight"), "sql")


@pytest.mark.parametrize("name", pl.plot.__all__)
def test_it_draws_where_it_is_told(name: str) -> None:
    figure = Figure()
    for ax in (figure.add_subplot(1, 2, 1), figure.add_axes((0.5, 0.1, 0.4, 0.8))):
        assert DRAW[name](ax) is ax
    figure.draw_without_rendering()


@pytest.mark.parametrize("name", pl.plot.__all__)
def test_it_takes_the_style_and_leaves_no_trace(name: str) -> None:
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context():
        matplotlib.style.use("dark_background")
        ax = DRAW[name](None)
    assert dict(matplotlib.rcParams) == before
    assert ax._repr_png_().startswith(b"\x89PNG")
    assert to_rgb(ax.figure.get_facecolor()) == (0, 0, 0)
    # cells of the heat map have colours of their own, and so the text in them
    texts = [*(ax.texts if name != "similarity" else []), ax.xaxis.label, ax.title]
    legends = [each for each in (ax.get_legend(), *ax.figure.legends) if each]
    texts += [text for each in legends for text in each.texts]
    assert {to_rgb(text.get_color()) for text in texts} == {(1, 1, 1)}
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_show_on_white_and_on_black(colour: str) -> None:
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    light = np.dot(parts, [0.2126, 0.7152, 0.0722])
    assert 1.05 / (light + 0.05) > 2.9 and (light + 0.05) / 0.05 > 2.9


@pytest.mark.heavy
def test_matplotlib_is_imported_by_who_draws() -> None:
    code = """
import sys, torch, peftlite as pl
model = torch.nn.Linear(4, 4)
delta = pl.attach(model, pl.LoRA(rank=2, targets="weight"))
draw = pl.plot.change
assert not {name for name in sys.modules if name.startswith("matplotlib")}
draw(delta)
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
