"""BOFT: the paper's butterfly, its reach and its count of parameters."""

import pytest
import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.methods.boft import BOFT
from tests.cells import close, disturb
from tests.zoo import seeded


def one_linear(size: int, scales: bool = True, **how: int) -> tuple[Tensor, Tensor, nn.Module]:
    """W, W' and the patch of a single layer in double precision."""
    with seeded(7):
        model = nn.Linear(size, 9).double()
        delta = disturb(pl.attach(model, BOFT(targets="weight", **how)))
        patch = delta.placed["weight"].patch
    if not scales:
        patch.s.data.fill_(1.0)
    return model.weight.raw.detach(), model.weight.detach(), patch


def factor(patch: nn.Module, i: int, size: int) -> Tensor:
    """B of §4, entry by entry: block p turns the half-blocks at p's place and 2ⁱ further on."""
    k, made = patch.block, torch.eye(size, dtype=patch.q.dtype)
    half, distance, one = k // 2, 2**i, torch.eye(k, dtype=patch.q.dtype)
    firsts = [j for j in range(2 * size // k) if not j // distance % 2]
    for q, first in zip(patch.q[i].detach(), firsts, strict=True):
        skew = torch.zeros_like(one)
        skew[tuple(torch.triu_indices(k, k, 1))] = q
        skew = skew - skew.T
        at = torch.cat([torch.arange(half) + j * half for j in (first, first + distance)])
        made[at[:, None], at] = (one - skew) @ torch.linalg.inv(one + skew)
    return made


@pytest.mark.parametrize("size, block_size, m", [(16, 4, 1), (16, 4, 2), (24, 2, 3), (64, 4, 5)])
def test_the_equation(size: int, block_size: int, m: int) -> None:
    """W' = diag(s) W Rᵀ with R = B_m … B₁."""
    w, changed, patch = one_linear(size, block_size=block_size, m=m)
    r = torch.eye(size, dtype=w.dtype)
    for i in range(m):
        r = factor(patch, i, size) @ r
    close(changed, patch.s.detach()[:, None] * (w @ r.T), 1e-12)


def test_of_outputs_the_rows_are_mixed() -> None:
    """W' = diag(s) R W, the transposed of what it makes of Wᵀ but for s."""
    with seeded(7):
        model = nn.Linear(9, 16).double()
        patch = disturb(pl.attach(model, BOFT(m=3, outputs=True))).placed["weight"].patch
    r = factor(patch, 2, 16) @ factor(patch, 1, 16) @ factor(patch, 0, 16)
    w = model.weight.raw.detach()
    close(model.weight.detach(), patch.s.detach()[:, None] * (r @ w), 1e-12)


def test_enough_factors_reach_every_input() -> None:
    """§4: each factor doubles what an input reaches; log₂(d/b) + 1 of them make R dense."""
    for m in range(1, 5):
        _, _, patch = one_linear(16, scales=False, block_size=2, m=m)
        inputs = torch.eye(16, dtype=torch.float64)[:9]
        reach = inputs + patch.turn(inputs)
        assert (reach.abs() > 1e-12).sum(-1).eq(2**m).all()


def test_only_the_scales_change_lengths_and_none_the_angles() -> None:
    w, changed, patch = one_linear(24, block_size=4, m=3)
    s = patch.s.detach()
    close(changed @ changed.T, s[:, None] * (w @ w.T) * s, 1e-12)


def test_parameters() -> None:
    """§4: ½(b−1)dm for R, and a scale per output."""
    _, _, patch = one_linear(32, block_size=8, m=3)
    assert patch.q.numel() == 7 * 32 * 3 // 2 and patch.s.numel() == 9


def test_inputs_that_do_not_fit() -> None:
    model = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 6), nn.Linear(6, 2))
    with pytest.raises(pl.TargetError, match=r"0\.weight is .* a multiple of 2ᵐ"):
        pl.attach(model, BOFT(m=2))
    delta = pl.attach(model, BOFT(m=2, exclude="0"))
    assert delta.placed["1.weight"].patch.block == 2  # 4 would need a multiple of 8
    assert pl.attach(model, BOFT(m=1), "other").placed["0.weight"].patch.block == 5
