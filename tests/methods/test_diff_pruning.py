"""DiffPruning: its gates, their penalty, and the step from gates to a fixed mask."""

import math
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.methods.diff_pruning import DiffPruning
from tests.cells import close, disturb
from tests.zoo import seeded


def linear(steps: int = 1000, **how) -> tuple[nn.Module, nn.Module]:
    """A layer in double precision, and its patch, which makes a difference."""
    with seeded(3):
        model = nn.Linear(6, 8).double()
        delta = disturb(pl.attach(model, DiffPruning(steps=steps, targets="weight", **how)))
    return model, delta.placed["weight"].patch


def z(alpha: Tensor, u: Tensor | float, l: float = -1.5, r: float = 1.5) -> Tensor:  # noqa: E741
    """§3.1, entry by entry."""
    u = torch.as_tensor(u, dtype=alpha.dtype).expand(alpha.shape)
    s = 1 / (1 + torch.exp(-(torch.log(u) - torch.log(1 - u) + alpha.detach())))
    return torch.minimum(torch.ones(()), torch.maximum(torch.zeros(()), s * (r - l) + l))


@pytest.mark.parametrize("structured", [False, True])
def test_the_equation(structured: bool) -> None:
    """W' = W + z⊙w; in training u is drawn, in evaluation it is ½, its median."""
    model, patch = linear(structured=structured, l=-0.2, r=1.3, alpha_init=0.5)
    u = torch.rand(2, 8, 6, dtype=torch.float64) * 0.98 + 0.01
    us = iter([u[0], u[1, 0, 0]])
    with mock.patch.object(torch, "rand_like", lambda _: next(us)):
        drawn = model.train().weight - model.weight.raw
    gate = z(patch.alpha, u[0], -0.2, 1.3)
    middle = z(patch.alpha, 0.5, -0.2, 1.3)
    if structured:
        gate = gate * z(patch.group_alpha, u[1, 0, 0], -0.2, 1.3)
        middle = middle * z(patch.group_alpha, 0.5, -0.2, 1.3)
    close(drawn, gate * patch.values, 1e-12)
    close(model.eval().weight - model.weight.raw, middle * patch.values, 1e-12)
    assert 0 < middle.count_nonzero() and not torch.allclose(gate, middle)


def test_a_fresh_one_changes_nothing_in_training_either() -> None:
    model, x = nn.Linear(6, 8), torch.randn(2, 6)
    before = model(x)
    pl.attach(model, DiffPruning(steps=5, structured=True, targets="weight"))
    assert torch.equal(model.train()(x), before)


def test_the_penalty_is_the_chance_of_an_open_gate() -> None:
    """§3.1: E‖z‖₀ = Σ σ(α − log(−l/r)), by simulation; a structured gate is one more factor."""
    model, patch = linear(l=-0.5, r=1.2, alpha_init=0.0, l0_penalty=2.0)
    draws = [torch.rand(8, 6, dtype=torch.float64) for _ in range(4000)]
    opened = sum(int(z(patch.alpha, u, -0.5, 1.2).count_nonzero()) for u in draws)
    delta = pl.deltas(model)["default"]
    assert math.isclose(delta.regularizer().item(), 2 * opened / len(draws), rel_tol=0.01)
    delta.regularizer().backward()
    assert (patch.alpha.grad > 0).all() and patch.values.grad is None
    model, patch = linear(structured=True, l=-0.5, r=1.2, l0_penalty=2.0)
    shift = math.log(0.5 / 1.2)
    expected = 2 * (patch.alpha - shift).sigmoid().sum() * (patch.group_alpha - shift).sigmoid()
    close(pl.deltas(model)["default"].regularizer(), expected, 1e-12)


@pytest.mark.parametrize("structured", [False, True])
def test_the_largest_of_what_is_changed_stay_as_they_are(structured: bool) -> None:
    """§3.2: magnitude pruning of z⊙w; they train on from there, without gates."""
    model, patch = linear(steps=1, fraction=0.25, structured=structured, alpha_init=0.0)
    delta, raw = pl.deltas(model)["default"], model.weight.raw
    before = (model.eval().weight - raw).detach()
    model.train()
    delta.step()
    least = before.abs().flatten().topk(12).values[-1]
    kept = before.abs() >= least
    for mode in (model.train, model.eval):
        mode()
        close(model.weight - raw, before * kept, 1e-12)
    assert delta.regularizer() == 0
    optimizer = torch.optim.Adam(delta.parameters(), lr=0.1)
    model.train()(torch.randn(3, 6).double()).square().sum().backward()
    assert torch.equal(patch.values.grad != 0, kept) and not patch.alpha.grad.any()
    optimizer.step()
    assert torch.equal((model.weight - raw) != 0, kept)


def test_the_penalty_closes_the_gates_that_do_no_good() -> None:
    """Three entries explain the data; of the others' gates the penalty closes nearly all."""
    torch.manual_seed(0)
    model, x = nn.Linear(8, 8, bias=False), torch.randn(256, 8)
    target = model.weight.detach().clone()
    target.view(-1)[[3, 20, 41]] += torch.tensor([1.0, -1.5, 2.0])
    delta = pl.attach(
        model, DiffPruning(steps=301, fraction=3 / 64, l0_penalty=2e-3, targets="weight")
    )
    patch = delta.placed["weight"].patch
    gates = [p for name, p in delta.named_parameters() if name.endswith("alpha")]
    groups = [{"params": [patch.values], "lr": 0.02}, {"params": gates, "lr": 0.1}]
    optimizer = torch.optim.Adam(groups)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (model.train()(x) - x @ target.T).square().mean()
        (loss + delta.regularizer()).backward()
        optimizer.step()
        delta.step()
    change = (model.eval().weight - model.weight.raw).detach().flatten()
    assert change.count_nonzero() <= 10
    delta.step()
    change = (model.weight - model.weight.raw).detach().flatten()
    assert set(change.nonzero().flatten().tolist()) == {3, 20, 41}
    close(change[[3, 20, 41]], torch.tensor([1.0, -1.5, 2.0]), 0.05)


def test_its_numbers() -> None:
    for wrong, says in (
        ({"l": 0}, "l must be finite and below 0"),
        ({"r": 1}, "r must be finite and above 1"),
        ({"l0_penalty": -1}, "l0_penalty must be finite, from 0 up"),
        ({"structured": 1}, "structured must be one of True, False, not 1"),
    ):
        with pytest.raises(pl.PeftliteError, match=says):
            DiffPruning(steps=1, **wrong)
    assert DiffPruning(steps=1).fraction == 0.005
