"""LoHa: the paper's equation, its rank and its count of parameters."""

import pytest
import torch
from torch import nn

import peftlite as pl
from peftlite.methods.loha import LoHa
from tests.cells import close, disturb
from tests.zoo import KINDS, seeded

KIND = {kind.name: kind for kind in KINDS}


def anywhere(site: pl.Site) -> bool:
    return True


@pytest.mark.parametrize("name", "gpt experts conv2d_grouped conv_transpose embedding".split())
def test_the_equation(name: str) -> None:
    """ΔW = s·(w1a w1b) ⊙ (w2a w2b), of every matrix, kernels flattened, in the weight's layout."""
    with seeded():
        delta = disturb(pl.attach(KIND[name].model(), LoHa(rank=2, alpha=3, targets=anywhere)))
    for placed in delta.placed.values():
        w, patch = placed.site.tensor, placed.patch
        made = 1.5 * (patch.w1a @ patch.w1b) * (patch.w2a @ patch.w2b)
        made = made.mT if placed.site.layout.transposed else made
        close(patch.value(w) - w, made.reshape(w.shape))


def test_the_rank_is_that_of_lora_squared_at_twice_its_parameters() -> None:
    """rank ≤ r²: Proposition 1; with 2r(o + i) parameters for r = r₁ = r₂: Proposition 2."""
    model = nn.Sequential(nn.Linear(24, 20).double())
    with seeded():
        delta = disturb(pl.attach(model, LoHa(rank=3, targets=anywhere)))
    placed = delta.placed["0.weight"]
    w = placed.site.tensor
    assert torch.linalg.matrix_rank(placed.patch.value(w) - w, rtol=1e-9) == 9
    assert delta.num_parameters == 2 * 3 * (24 + 20)
    lora = pl.plan(nn.Sequential(nn.Linear(24, 20)), pl.LoRA(rank=3, targets=anywhere))
    assert delta.num_parameters == 2 * lora.delta.num_parameters
