"""FullTuning's last layers and BitFit's added biases: which sites they take."""

import pytest
import torch
from torch import nn

import peftlite as pl
from tests.zoo import KINDS

ZOO = {kind.name: kind for kind in KINDS}


@pytest.mark.parametrize("kind, k, layers", [
    ("gpt", 1, {"blocks.1"}),
    ("gpt", 9, {"blocks.0", "blocks.1"}),
    ("hf_bert", 1, {"bert.encoder.layer.1"}),
    ("hf_t5", 1, {"encoder.block.1", "decoder.block.1"}),
    ("mlp", 2, {"2", "4"}),
])  # fmt: skip
def test_the_last_layers_are_taken_by_their_numbers(kind: str, k: int, layers: set[str]) -> None:
    model = ZOO[kind].model()
    delta = pl.attach(model, pl.FullTuning(top_layers=k))
    expected = {
        name for name, _ in model.named_parameters(remove_duplicate=False)
        if any(name.startswith(layer + ".") for layer in layers)
        and "peftlite" not in name
    }  # fmt: skip
    assert set(delta.placed) == expected


def test_layers_ten_and_up_come_last() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(12)))
    delta = pl.attach(model, pl.FullTuning(top_layers=3))
    assert set(delta.placed) == {"9.weight", "10.weight", "11.weight"}


def test_missing_biases_are_added_where_a_linear_map_has_none() -> None:
    model = ZOO["hf_llama"].model()
    delta = pl.attach(model, pl.BitFit(add_missing=True))
    maps = {f"{name}()" for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(delta.placed) == maps - {"lm_head()"}
    torch.manual_seed(0)
    for patch in (placed.patch for placed in delta.placed.values()):
        nn.init.normal_(patch.d)
    batch = ZOO["hf_llama"].batch()
    output = ZOO["hf_llama"].run(model, batch)
    plain = ZOO["hf_llama"].model()
    for address, placed in delta.placed.items():
        plain.get_submodule(address.removesuffix("()")).bias = nn.Parameter(placed.patch.d.detach())
    torch.testing.assert_close(output, ZOO["hf_llama"].run(plain, batch))


def test_added_and_present_biases_make_one_delta() -> None:
    delta = pl.attach(ZOO["mlp"].model(), pl.BitFit(add_missing=True))
    assert set(delta.placed) == {"0.bias", "2()", "4.bias"}
