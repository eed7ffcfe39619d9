"""BOFT: the paper's butterfly, its reach and its count of parameters; the same in peft."""

import copy
from unittest import mock

import pytest
import torch
from peft import BOFTConfig, get_peft_model
from peft.tuners.boft import layer as peft_layer
from torch import Tensor, nn

import peftlite as pl
from peftlite.methods.boft import BOFT
from tests.test_contract import close, disturb
from tests.zoo import KINDS, seeded

KIND = {kind.name: kind for kind in KINDS}


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


def block_diagonals(blocks: Tensor) -> Tensor:
    """What peft's CUDA extension does."""
    return torch.stack([torch.block_diag(*each) for each in blocks])


@pytest.mark.parametrize("m", [1, 2, 3])
def test_the_same_in_peft(m: int) -> None:
    """With its extension stood in for: without it peft takes m = 1, whatever the config says."""
    kind, targets = KIND["hf_llama"], ["q_proj", "v_proj", "up_proj"]
    model, batch = kind.model(), kind.batch()
    with (
        mock.patch.object(peft_layer, "get_fbd_cuda", lambda: True),
        mock.patch.object(peft_layer.FastBlockDiag, "apply", block_diagonals),
    ):
        config = BOFTConfig(target_modules=targets, boft_block_size=4, boft_n_butterfly_factor=m)
        theirs = get_peft_model(copy.deepcopy(model), config).eval()
        delta = pl.attach(model, BOFT(block_size=4, m=m, targets=targets))
        for address, placed in delta.placed.items():
            name = address.removesuffix(".weight")
            layer = theirs.get_submodule(f"base_model.model.{name}")
            with seeded(5), torch.no_grad():
                full, s = layer.boft_R["default"].normal_(std=0.2), layer.boft_s["default"]
                s.add_(0.1 * torch.randn_like(s))
                above = torch.triu_indices(4, 4, 1)
                placed.patch.q.copy_(((full - full.mT) / 2)[..., above[0], above[1]])
                placed.patch.s.copy_(s[:, 0])
            w = placed.site.tensor
            mat, s = layer.get_delta_weight("default")
            assert (placed.patch.value(w) - (mat @ w.T).T * s).abs().max() <= 1e-5
        assert len(delta.placed) == 6
        close(kind.run(model, batch), kind.run(theirs, batch))
