"""Compacter: its equation, what its sites share, how big it is, what it never forms or refuses."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftlite as pl
from peftlite.methods.compacter import Compacter
from tests.zoo import KINDS, seeded

ZOO = {kind.name: kind for kind in KINDS}


def attached(model: nn.Module, **config: Any) -> pl.Delta:
    """One that makes a difference."""
    with seeded(1), torch.no_grad():
        delta = pl.attach(model, Compacter(**config))
        for parameter in delta.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return delta


def kronecker(a: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return sum(
        torch.kron(a_j.contiguous(), u_j.T @ v_j) for a_j, u_j, v_j in zip(a, u, v, strict=True)
    )


def by_hand(delta: pl.Delta, address: str, z: Tensor) -> Tensor:
    """up(gelu(down(z))), its maps formed as the paper has them."""
    state = delta.state_dict()
    own = {k.removeprefix(f"{address}:"): p for k, p in state.items()}
    a = next(p for k, p in state.items() if k.endswith(":a"))
    down = kronecker(a, own["down_u"], own["down_v"])
    up = kronecker(a, own["up_u"], own["up_v"])
    return F.gelu(z @ down.T + own["down_bias"]) @ up.T + own["up_bias"]


@pytest.mark.parametrize("n, k, r", [(4, 1, 8), (4, 3, 4), (2, 1, 6), (1, 2, 5)])
def test_the_maps_are_sums_of_kronecker_products(n: int, k: int, r: int) -> None:
    layer, x = nn.Linear(10, 12), torch.randn(3, 5, 10)
    y = layer(x)
    delta = attached(layer, targets="()", phm_dim=n, phm_rank=k, bottleneck_size=r, scale=0.5)
    torch.testing.assert_close(layer(x), y + 0.5 * by_hand(delta, "()", y), rtol=1e-5, atol=1e-5)


def test_it_agrees_with_the_authors_layer() -> None:
    # y = x·Σ Aⱼ ⊗ (leftⱼ rightⱼ), with inputs first: ours are its transposes
    a, left, right = torch.randn(4, 4, 4), torch.randn(4, 3, 1), torch.randn(4, 1, 2)
    x = torch.randn(5, 12)
    theirs = x @ sum(torch.kron(a_j, b_j) for a_j, b_j in zip(a, left @ right, strict=True))
    ours = x @ kronecker(a.mT, right, left.mT.contiguous()).T
    torch.testing.assert_close(ours, theirs)


def test_all_sites_share_one_a_and_keep_sharing_it(tmp_path: Any) -> None:
    model = ZOO["gpt"].model()
    delta = attached(model)
    assert [k for k in delta.state_dict() if k.endswith(":a")] == ["blocks.0.attn():a"]
    pl.save(delta, tmp_path / "a.safetensors")
    loaded = pl.load(ZOO["gpt"].model(), tmp_path / "a.safetensors")
    twin = pl.deltas(copy.deepcopy(model).double())["default"]
    for held in (delta, loaded, twin):
        assert len({id(placed.patch.a) for placed in held.placed.values()}) == 1
    attn, mlp = "blocks.1.attn", "blocks.1.mlp"
    z = torch.randn(2, 3, 16)
    for path in (attn, mlp):
        patched = model.get_submodule(path)(z)
        with pl.using(model, None):
            y = model.get_submodule(path)(z)
        expected = y + by_hand(delta, f"{path}()", y)
        torch.testing.assert_close(patched, expected, rtol=1e-5, atol=1e-5)


def test_it_has_of_the_order_of_d_plus_r_numbers() -> None:
    d, r, n = 64, 4, 4
    model = nn.ModuleList([nn.Linear(d, d) for _ in range(3)])
    delta = pl.attach(model, Compacter(targets=["0()", "1()", "2()"], reduction_factor=16))
    assert delta.num_parameters == n**3 + 3 * (3 * d + 3 * r)
    bottleneck = pl.plan(
        nn.Linear(d, d), pl.BottleneckAdapter(targets="()", reduction_factor=16)
    ).num_parameters
    assert bottleneck == 2 * d * r + d + r


@pytest.mark.parametrize("size, r", [
    ({}, 4),
    ({"reduction_factor": 7}, 12),
    ({"phm_dim": 5}, 5),
    ({"bottleneck_size": 6}, 8),
    ({"bottleneck_size": 8}, 8),
])  # fmt: skip
def test_the_bottleneck_is_rounded_up_to_a_multiple(size: dict[str, Any], r: int) -> None:
    delta = pl.attach(nn.Linear(8, 80), Compacter(targets="()", **size))
    assert delta.state_dict()["():down_bias"].shape == (r,)


@pytest.mark.parametrize("kind, preset, taken", [
    ("gpt", "compacter", ["blocks.0.attn()", "blocks.0.mlp()"]),
    ("gpt", "compacter++", ["blocks.0.mlp()", "blocks.1.mlp()"]),
    ("hf_bert", "compacter++", [f"bert.encoder.layer.{i}.output.dense()" for i in (0, 1)]),
])  # fmt: skip
def test_presets(kind: str, preset: str, taken: list[str]) -> None:
    plan = pl.plan(ZOO[kind].model(), Compacter(preset=preset))
    assert plan.addresses[:2] == taken


class Sizes(TorchDispatchMode):
    """Notes how large tensors become."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.largest = max(self.largest, made.numel())
        return made


def test_no_map_is_ever_formed() -> None:
    layer, x = nn.Identity(), torch.randn(2, 128)
    attached(layer, targets="()", width=128, bottleneck_size=32)
    with Sizes() as sizes:
        layer(x).sum().backward()
    assert sizes.largest == x.numel() < 32 * 128


def test_the_papers_init_nearly_changes_nothing() -> None:
    layer, x = nn.Linear(64, 64), torch.randn(3, 64)
    y = layer(x)
    delta = pl.attach(layer, Compacter(targets="()", init="glorot"))
    u, v = delta.state_dict()["():up_u"], delta.state_dict()["():down_v"]
    assert 0.9 * (12 / 2) ** 0.5 > u.abs().max() > 0 and v.abs().max() <= (12 / 17) ** 0.5
    assert 0 < (layer(x) - y).abs().max() < 0.01


def test_it_learns() -> None:
    layer, x, target = nn.Linear(16, 16), torch.randn(64, 16), torch.randn(64, 16)
    with seeded():
        delta = pl.attach(layer, Compacter(targets="()", bottleneck_size=16))
    optimizer = torch.optim.Adam(delta.parameters(), lr=0.03)
    losses = []
    for _ in range(100):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_width_that_n_doesnt_divide_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
    says = r"1\(\) is a call; Compacter takes calls .* a multiple of phm_dim"
    with pytest.raises(pl.TargetError, match=says):
        pl.attach(model, Compacter(targets="1()"))
    assert pl.plan(model, Compacter(targets=lambda site: True)).addresses == ["0()"]


@pytest.mark.parametrize("config, says", [
    ({"preset": "houlsby"}, "preset must be one of 'compacter', 'compacter\\+\\+', not 'houlsby'"),
    ({"init": "normal"}, "init must be one of 'zero', 'glorot', not 'normal'"),
    ({"phm_dim": 0}, "phm_dim must be a whole number from 1 up, not 0"),
    ({"phm_rank": 1.5}, "phm_rank must be a whole number from 1 up, not 1.5"),
])  # fmt: skip
def test_settings_are_checked(config: dict[str, Any], says: str) -> None:
    with pytest.raises(pl.PeftliteError, match=says):
        Compacter(**config)
