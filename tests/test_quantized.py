"""Quantised bases: what changes a call runs, trains, saves and loads; the rest says why not."""

from pathlib import Path

import pytest
import torch

import peftlite as pl
from tests.cells import disturb
from tests.coded import linears, quantize_
from tests.digest import assert_same, digest

RIDING = {
    "LoRA": pl.LoRA(rank=2, targets="weight"),
    "IA3": pl.IA3(targets=["0", "2"]),
    "OFT": pl.OFT(block_size=2, targets="weight"),
    "HRA": pl.HRA(rank=2, targets="weight"),
    "VeRA": pl.VeRA(rank=2, targets="0"),
    "BitFit": pl.BitFit(),
    "BottleneckAdapter": pl.BottleneckAdapter(targets="0"),
}
X = torch.randn(3, 8)


@pytest.mark.parametrize("method", RIDING)
@pytest.mark.parametrize("base", ["sha256", "sampled"])
def test_what_changes_calls_stands_a_quantised_base(method: str, base, tmp_path: Path) -> None:
    model = quantize_(linears())
    before, output = digest(model), model(X)
    delta = pl.attach(model, RIDING[method], "a")
    model(X).square().sum().backward()
    assert all(p.grad is not None for p in delta.parameters())
    disturb(delta)
    expected = model(X)
    pl.save(delta, tmp_path / "a", base=base)
    fresh = quantize_(linears())
    pl.load(fresh, tmp_path / "a", trainable=True)
    assert torch.equal(fresh(X), expected)
    pl.detach(model, "a")
    assert_same(before, digest(model))
    assert torch.equal(model(X), output)


def test_a_file_knows_the_codes_that_it_was_made_for(tmp_path: Path) -> None:
    model = quantize_(linears())
    pl.save(pl.attach(model, RIDING["LoRA"], "a"), tmp_path / "a")
    other = quantize_(linears())
    other[0].weight.codes[0, 0] += 1
    with pytest.raises(pl.BaseMismatchError, match=r"1 of 2 tensors differ: 0\.weight"):
        pl.load(other, tmp_path / "a")
    with pytest.raises(pl.BaseMismatchError, match="2 of 2 tensors differ"):
        pl.load(linears(), tmp_path / "a")


def test_low_rank_products_still_add_up() -> None:
    model = quantize_(linears())
    delta = pl.attach(model, RIDING["LoRA"], "a")
    disturb(delta)
    expected = model(X)
    pl.combine(model, {"a": 1.0}, how="svd", rank=2, name="b")
    torch.testing.assert_close(model(X), expected)


def test_a_change_of_codes_is_measured_by_its_factors_or_refused() -> None:
    model = quantize_(linears())
    pl.plot.change(pl.attach(model, RIDING["LoRA"], "factors"))
    turned = pl.attach(model, RIDING["HRA"], "turned")
    for act in (lambda: pl.plot.change(turned), lambda: pl.rescale(model, turned, 2, name="more")):
        with pytest.raises(pl.PeftliteError, match="holds codes for numbers"):
            act()
