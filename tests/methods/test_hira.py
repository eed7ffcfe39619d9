"""What the paper claims of HiRA: a change of high rank, in proportion to each weight."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close as close

import peftlite as pl
from peftlite.methods.hira import HiRAPatch


def patched(w: torch.Tensor, **options: object) -> tuple[nn.Module, HiRAPatch]:
    module = nn.Linear(w.shape[1], w.shape[0], bias=False)
    module.weight.data.copy_(w)
    delta = pl.attach(module, pl.HiRA(targets="weight", **options))
    return module, delta.placed["weight"].patch


@torch.no_grad()
def test_the_equation() -> None:
    w, x = torch.randn(5, 7), torch.randn(3, 7)
    module, patch = patched(w, rank=2)
    nn.init.normal_(patch.b)
    close(module(x), x @ (w + w * (patch.b @ patch.a)).T)


@torch.no_grad()
def test_the_change_is_of_a_higher_rank_than_its_factors() -> None:
    """LoRA's would be of rank 2; W ⊙ BA is of rank 16 (Huang et al., §3.3)."""
    w = torch.randn(16, 16, dtype=torch.float64)
    _, patch = patched(w.float(), rank=2, dtype=torch.float64)
    nn.init.normal_(patch.b)
    change = patch.value(w) - w
    assert torch.linalg.matrix_rank(patch.b @ patch.a) == 2
    assert torch.linalg.matrix_rank(change) == 16


@torch.no_grad()
def test_a_weight_that_is_zero_stays_zero() -> None:
    w = torch.randn(6, 6).triu()
    _, patch = patched(w, rank=3)
    nn.init.normal_(patch.b)
    assert not patch.value(w).tril(-1).any()


def test_it_counts_as_many_numbers_as_lora() -> None:
    module = nn.Linear(12, 20)
    hira, lora = (pl.plan(module, m(rank=4, targets="weight")) for m in (pl.HiRA, pl.LoRA))
    assert hira.num_parameters == lora.num_parameters == 4 * (12 + 20)


def test_dropout_drops_inputs_of_the_change_alone() -> None:
    torch.manual_seed(0)
    w, x = torch.ones(1, 400), torch.ones(1, 400)
    module, patch = patched(w, rank=1, dropout=0.5)
    nn.init.ones_(patch.a), nn.init.ones_(patch.b)
    module.eval()
    assert module(x).item() == 800
    module.train()
    changes = [module(x).item() - 400 for _ in range(50)]
    assert len({*changes}) > 1 and all(c % 2 == 0 for c in changes)
    assert abs(sum(changes) / 50 - 400) < 15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_it_rounds_once(dtype: torch.dtype) -> None:
    w = torch.randn(8, 8).to(dtype)
    module = nn.Linear(8, 8, bias=False, dtype=dtype)
    module.weight.data.copy_(w)
    patch = pl.attach(module, pl.HiRA(rank=2, targets="weight")).placed["weight"].patch
    nn.init.normal_(patch.b)
    exact = w.double() * (1 + patch.b.double() @ patch.a.double())
    assert torch.equal(patch.value(w), exact.float().to(dtype))
