"""Learning rates that are left to auto: near what was published, for the same models."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import peftlite as pl
from peftlite.train.auto import learning_rate
from tests.train.tiny import gpt, trainer


def rate(method: Any, width: int, b_ratio: float = 1.0) -> float:
    """For one square matrix of a model that says how wide it is."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    model.config = SimpleNamespace(hidden_size=width)
    return learning_rate(model, [pl.attach(model, method)], b_ratio)


LORA = pl.LoRA(rank=32, targets="0")

PUBLISHED = [
    (LORA, 2000, 5e-4, 5e-4),  # Schulman et al.: the rule itself
    (LORA, 4096, 2.8e-4, 2.9e-4),
    (pl.FullTuning(), 2000, 5e-5, 5e-5),
    (pl.LoRA(rank=8, alpha=16, targets="0"), 768, 5e-4, 1.5e-3),  # RoBERTa-base: 5e-4
    (pl.IA3(targets="0"), 2048, 3e-3, 5e-3),  # T0-3B: 3e-3
    (pl.VeRA(rank=4, targets="0"), 3072, 1e-3, 6e-3),  # Llama-3.2-3B: 1e-3
    (pl.VeRA(rank=4, targets="0"), 768, 1e-2, 2e-2),  # RoBERTa-base: 2e-2
    (pl.FourierFT(targets="0"), 4096, 0.02, 0.05),  # Llama-2-7B: 0.05
    (pl.HRA(rank=2, targets="0"), 768, 8e-4, 3e-3),  # DeBERTaV3-base: 8e-4 to 3e-3
]


@pytest.mark.parametrize(("method", "width", "low", "high"), PUBLISHED)
def test_rates_are_near_the_published_ones(
    method: pl.Method, width: int, low: float, high: float
) -> None:
    assert low <= rate(method, width) <= high


def test_a_scale_of_lora_counts_by_its_root() -> None:
    whole = rate(LORA, 2000)
    for scaled, times in [
        (pl.LoRA(rank=8, alpha=32, targets="0"), 1),
        (pl.LoRA(rank=8, targets="0"), 2),
        (pl.DoRA(rank=2, targets="0"), 4),
        (pl.LoRA(rank=64, alpha=128, targets="0"), 0.5),
        (pl.LoRA(rank=16, alpha=32, scaling="rslora", targets="0"), 0.5),
        (pl.LoRA(rank=4, init="pissa", targets="0"), 0.5),
        (pl.Gated(pl.LoRA(rank=8, targets="0")), 2),
    ]:
        assert rate(scaled, 2000) == pytest.approx(times * whole)
    assert rate(LORA, 2000, b_ratio=16) == pytest.approx(whole / 4, rel=0.05)


def test_of_several_methods_the_lowest_decides_but_not_a_small_head() -> None:
    assert rate([LORA, pl.IA3(targets="1")], 2000) == rate(LORA, 2000)
    assert rate([LORA, pl.FullTuning(targets="1")], 2000) == rate(LORA, 2000)
    small = pl.LoRA(rank=32, targets="1")
    assert rate([small, pl.FullTuning(targets="0")], 2000) == rate(pl.FullTuning(), 2000)


def test_a_model_of_parts_is_as_wide_as_its_text_model() -> None:
    model = nn.Linear(8, 8)
    delta = pl.attach(model, pl.LoRA(rank=32, targets="weight"))
    model.config = SimpleNamespace(text_config=SimpleNamespace(hidden_size=2000))
    assert learning_rate(model, [delta]) == 5e-4


def test_a_model_without_a_config_is_as_wide_as_most_of_its_matrices() -> None:
    wide = 5e-4 * (2000 / 16) ** 0.781
    settings = trainer(gpt(pl.LoRA(rank=32)), lr="auto").settings()
    assert settings["lr"] == pytest.approx(wide, rel=0.05)


def test_other_deltas_of_the_model_are_no_part_of_its_width() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    alone = learning_rate(model, [pl.attach(model, pl.LoRA(rank=4), name="first")])
    for name in ("second", "third"):
        delta = pl.attach(model, pl.LoRA(rank=4), name=name)
    assert learning_rate(model, [delta]) == alone
