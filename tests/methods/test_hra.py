"""HRA: the paper's chain of reflections, its start and its rank."""

import pytest
import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.methods.hra import HRA
from tests.cells import close, disturb
from tests.methods.test_oft import LAYOUTS, anywhere, rows_of
from tests.zoo import KINDS, seeded

KIND = {kind.name: kind for kind in KINDS}


def chain(u: Tensor) -> Tensor:
    """H₁ … H_r of vectors (r, d)."""
    made = one = torch.eye(u.shape[-1], dtype=u.dtype)
    for vector in u:
        made = made @ (one - 2 * torch.outer(vector, vector) / vector.dot(vector))
    return made


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_equation(name: str) -> None:
    """W' = W H₁ … H_r, one chain for a matrix; it is orthogonal, so angles and lengths stay."""
    with seeded():
        model = KIND[name].model(torch.float64)
        delta = disturb(pl.attach(model, HRA(rank=6, targets=anywhere)))
    for placed in delta.placed.values():
        w, patch, site = placed.site.tensor, placed.patch, placed.site
        chains = [chain(u) for u in patch.u.detach().reshape(-1, *patch.u.shape[-2:])]
        p = torch.stack(chains) if patch.stack else chains[0]
        before, after = rows_of(w, site), rows_of(patch.value(w), site)
        close(after, before @ p, 1e-12)
        close(after @ after.mT, before @ before.mT, 1e-12)


def patch_of(size: int, dtype: torch.dtype = torch.float64, **how: int) -> nn.Module:
    with seeded(3):
        model = nn.Linear(size, 5).to(dtype)
        return pl.attach(model, HRA(targets="weight", **how)).placed["weight"].patch


@pytest.mark.parametrize("size", [2, 7, 33, 257])
def test_it_begins_at_exactly_nothing(size: int) -> None:
    """§3.1: pairs of equal vectors, any of which undoes itself; here to the last bit."""
    patch = patch_of(size, torch.float32, rank=8)
    first, second = patch.u.unflatten(-2, (-1, 2)).unbind(-2)
    assert torch.equal(first, second) and not torch.equal(first[0], first[1])
    x = torch.randn(3, size)
    assert not patch.turn(x).any() and not patch.turn(x, transposed=True).any()


def test_the_rank_of_the_change_is_at_most_r() -> None:
    """§3.3: a chain of r reflections is an adaptive low-rank change."""
    patch = patch_of(24, rank=4)
    with torch.no_grad():
        patch.u.normal_()
    one = torch.eye(24, dtype=torch.float64)
    change = patch.turn(one)
    assert torch.linalg.matrix_rank(change, rtol=1e-9) == 4
    assert torch.linalg.det(one + change).item() == pytest.approx(1)  # an even number of them
    close(patch.turn(one, transposed=True), change.mT, 1e-12)


def test_a_small_step_is_not_rounded_away() -> None:
    """In fp32 the change is right to its own size, not to that of the 1 it's added to."""
    patch = patch_of(16, torch.float32, rank=4)
    with torch.no_grad():
        patch.u[1] += 1e-6 * torch.randn(16)
    change = patch.turn(torch.eye(16)).detach().double()
    exact = chain(patch.u.detach().double()) - torch.eye(16, dtype=torch.float64)
    assert (change - exact).norm() < 1e-4 * exact.norm()


def test_both_of_a_pair_learn_at_once() -> None:
    patch = patch_of(12, rank=2)
    weight = torch.randn(12, 3, dtype=torch.float64)
    (patch.turn(torch.eye(12, dtype=torch.float64)) @ weight).sum().backward()
    assert patch.u.grad.abs().sum(-1).gt(1e-3).all()
    close(patch.u.grad[0], -patch.u.grad[1], 1e-12)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_an_odd_chain_is_refused(rank: int) -> None:
    """peft warns, and begins with another model than the base."""
    with pytest.raises(pl.PeftliteError, match="rank must be an even number from 2 up"):
        HRA(rank=rank)


def test_the_regularizer_is_the_papers() -> None:
    """λΣ‖UᵀU − I‖² of unit vectors, whatever their lengths; none by default."""
    model = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 4))
    delta = pl.attach(model, HRA(rank=4, orth_reg_weight=0.3, targets="weight"))
    disturb(delta)
    expected = 0.0
    for placed in delta.placed.values():
        unit = torch.nn.functional.normalize(placed.patch.u.detach().double(), dim=-1)
        expected += (unit @ unit.T - torch.eye(4)).square().sum().item()
    assert delta.regularizer().item() == pytest.approx(0.3 * expected, rel=1e-5)
    before = delta.regularizer().item()
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.mul_(7)
    assert delta.regularizer().item() == pytest.approx(before, rel=1e-5)
    assert pl.attach(model, HRA(rank=2, targets="0"), "plain").regularizer() == 0
