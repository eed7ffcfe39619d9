"""OFT: the paper's equation, what a rotation keeps, the Neumann series."""

import itertools

import pytest
import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.methods.oft import OFT, block_near
from tests.cells import close, disturb
from tests.zoo import KINDS, seeded

KIND = {kind.name: kind for kind in KINDS}
LAYOUTS = ["gpt", "experts", "conv2d_grouped", "conv_transpose", "conv1d_hf", "embedding"]


def anywhere(site: pl.Site) -> bool:
    return True


def rows_of(w: Tensor, site: pl.Site) -> Tensor:
    """The neurons of a weight, written out one by one: (*stack, n, d)."""
    module = site.module
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d):
        by_group = w.chunk(module.groups)
        return torch.stack([part[:, o].flatten() for part in by_group for o in range(w.shape[1])])
    if isinstance(module, nn.Conv2d):
        return torch.stack([neuron.flatten() for neuron in w])
    return w.mT if site.layout.transposed and not isinstance(module, nn.Embedding) else w


def rotation(patch: nn.Module, q: Tensor) -> Tensor:
    """R of one matrix, from its blocks' Q (blocks, k(k−1)/2)."""
    k, blocks = patch.block, []
    for entries in q:
        skew = q.new_zeros(k, k)
        skew[tuple(torch.triu_indices(k, k, 1))] = entries
        skew, one = skew - skew.T, torch.eye(k, dtype=q.dtype)
        blocks.append((one - skew) @ torch.linalg.inv(one + skew))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_equation(name: str) -> None:
    """W' = W Rᵀ for the neurons of every layout, one R for a matrix, each matrix with its own."""
    with seeded():
        model = KIND[name].model(torch.float64)
        delta = disturb(pl.attach(model, OFT(block_size=4, targets=anywhere)))
    for placed in delta.placed.values():
        w, patch, site = placed.site.tensor, placed.patch, placed.site
        matrices = patch.q.reshape(-1, *patch.q.shape[-2:])
        turned = [rotation(patch, q) for q in matrices]
        r = torch.stack(turned) if patch.stack else turned[0]
        close(rows_of(patch.value(w), site), rows_of(w, site) @ r.mT, 1e-12)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_equation_of_outputs(name: str) -> None:
    """W' = R W: the neurons of a matrix are mixed."""
    with seeded():
        model = KIND[name].model(torch.float64)
        delta = disturb(pl.attach(model, OFT(block_size=4, outputs=True, targets=anywhere)))
    for placed in delta.placed.values():
        w, patch, site = placed.site.tensor, placed.patch, placed.site
        turned = [rotation(patch, q) for q in patch.q.reshape(-1, *patch.q.shape[-2:])]
        r = torch.stack(turned) if patch.stack else turned[0]
        close(rows_of(patch.value(w), site), r @ rows_of(w, site), 1e-12)


@pytest.mark.parametrize("name", LAYOUTS)
def test_lengths_and_angles_of_neurons_stay(name: str) -> None:
    """§3: the hyperspherical energy is that of the base, since R is orthogonal."""
    with seeded():
        model = KIND[name].model(torch.float64)
        delta = disturb(pl.attach(model, OFT(block_size=4, targets=anywhere)))
    for placed in delta.placed.values():
        w = placed.site.tensor
        before, after = rows_of(w, placed.site), rows_of(placed.patch.value(w), placed.site)
        assert not torch.allclose(before, after)
        close(after @ after.mT, before @ before.mT, 1e-12)


def one_linear(method: pl.Method, scale: float) -> tuple[Tensor, Tensor, nn.Module]:
    """W, W' and the patch of a single layer, with small factors."""
    with seeded(7):
        model = nn.Sequential(nn.Linear(12, 9)).double()
        delta = pl.attach(model, method)
        patch = delta.placed["0.weight"].patch
        with torch.no_grad():
            patch.q.normal_(std=scale)
    return model[0].weight.raw.detach(), model[0].weight.detach(), patch


def test_the_neumann_series_turns_the_way_of_the_exact_map() -> None:
    """Each further term brings R closer to Cayley's, as ‖Q‖ᵏ⁺¹."""
    _, exact, _ = one_linear(OFT(block_size=4, targets="0"), 0.05)
    errors = []
    for terms in range(1, 6):
        w, near, _patch = one_linear(OFT(block_size=4, neumann_terms=terms, targets="0"), 0.05)
        errors.append((near - exact).norm() / (exact - w).norm())
    assert all(later < 0.25 * sooner for sooner, later in itertools.pairwise(errors))
    assert errors[-1] < 1e-4


@pytest.mark.parametrize("terms", [1, 2, 4])
def test_the_neumann_series_is_the_papers(terms: int) -> None:
    """R ≈ (I−Q)(I − Q + … ± Qᵏ)."""
    w, near, patch = one_linear(OFT(block_size=12, neumann_terms=terms, targets="0"), 0.2)
    skew = torch.zeros(12, 12, dtype=w.dtype)
    skew[tuple(torch.triu_indices(12, 12, 1))] = patch.q[0]
    skew, one = (skew - skew.T).detach(), torch.eye(12, dtype=w.dtype)
    series = sum((torch.linalg.matrix_power(-skew, j) for j in range(terms + 1)), 0 * one)
    close(near, w @ ((one - skew) @ series).T, 1e-12)


def test_a_rotation_of_1e_9_is_not_rounded_away() -> None:
    """R − I is formed without the I: in fp32, what is lost beside a 1 would be all of it."""
    patch = pl.attach(nn.Linear(8, 8), OFT(block_size=4, targets="weight")).placed["weight"].patch
    with torch.no_grad():
        patch.q.fill_(1e-9)
    change = patch.turn(torch.eye(8)).detach()
    assert change[0, 1].item() == pytest.approx(2e-9, rel=1e-5)


def test_coft_bounds_all_the_blocks_together() -> None:
    for scale, inside in ((1.0, False), (1e-3, True)):
        w, bounded, patch = one_linear(OFT(block_size=4, eps=0.2, targets="0"), scale)
        _, free, _ = one_linear(OFT(block_size=4, targets="0"), scale)
        assert torch.equal(bounded, free) == inside
        # ‖R − I‖ = ‖2Q(I+Q)⁻¹‖ ≤ 2‖Q‖
        assert patch.turn(torch.eye(12, dtype=w.dtype)).norm() <= 2 * 0.2 + 1e-9


@pytest.mark.parametrize(
    "size, wanted, block",
    [(64, 32, 32), (20, 32, 20), (20, 7, 5), (18, 4, 3), (7, 4, 7), (27, 32, 27), (147, 32, 21)],
)
def test_the_nearest_block_size_that_divides(size: int, wanted: int, block: int) -> None:
    assert block_near(size, wanted) == block


@pytest.mark.parametrize("method", [OFT(block_size=2, targets="0"), pl.HRA(rank=2, targets="0")])
def test_a_map_tied_to_an_embedding_is_read_as_rotated(method: pl.Method) -> None:
    """Ids are no inputs that could be turned."""
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Embedding(12, 8)).double()
    model[1].weight = model[0].weight
    with seeded():
        (placed,) = disturb(pl.attach(model, method)).placed.values()
    w, ids = placed.patch.value(placed.site.tensor), torch.arange(12)
    close(model[1](ids), w)
    close(model[0](torch.eye(8, dtype=w.dtype)), w.T)
