"""VeRA: the paper's equation, its count of parameters, its shared matrices."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import peftlite as pl
from peftlite.methods.vera import Projection, VeRA
from tests.cells import close, disturb
from tests.digest import bits
from tests.zoo import KINDS, seeded

KIND = {kind.name: kind for kind in KINDS}


def projections(model: nn.Module) -> list[Projection]:
    return [module for module in model.modules() if isinstance(module, Projection)]


def attached(name: str, method: VeRA) -> tuple[nn.Module, pl.Delta]:
    model = KIND[name].model()
    with seeded():
        return model, disturb(pl.attach(model, method))


def anywhere(site: pl.Site) -> bool:
    return True


@pytest.mark.parametrize("name", ["gpt", "experts", "conv2d_grouped", "conv_transpose", "hf_gpt2"])
def test_the_equation(name: str) -> None:
    """ΔW = diag(b) B diag(d) A, of every matrix, kernels flattened, in the layout of the weight."""
    model, delta = attached(name, VeRA(rank=3, targets=anywhere))
    (shared,) = projections(model)
    for placed in delta.placed.values():
        w, patch = placed.site.tensor, placed.patch
        change = patch.value(w) - w
        stack = w.shape[: patch.d.dim() - 1]
        change = change.reshape(*stack, w.shape[len(stack)], -1)
        if placed.site.layout.transposed:
            change = change.mT
        o, i = change.shape[-2:]
        made = patch.b.diag_embed() @ shared.b[:o] @ patch.d.diag_embed() @ shared.a[:, :i]
        close(change, made)


def test_it_learns_and_saves_two_vectors_a_site(tmp_path: Path) -> None:
    """|Θ| = L·(d + r): Section 3.2."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    delta = pl.attach(model, VeRA(rank=64, targets=anywhere))
    assert delta.num_parameters == 4 * (16 + 64)
    assert sorted(delta.state_dict()) == sorted(f"{i}.weight:{v}" for i in range(4) for v in "db")
    assert torch.equal(delta.state_dict()["0.weight:d"], torch.full((64,), 0.1))
    assert not delta.state_dict()["0.weight:b"].any()
    pl.save(delta, tmp_path / "vera.safetensors")
    assert pl.inspect(tmp_path / "vera.safetensors").tensors.keys() == delta.state_dict().keys()


def test_one_pair_of_matrices_is_shared_by_all_sites_and_stays_so() -> None:
    model, delta = attached("mlp", VeRA(rank=3))
    (shared,) = projections(model)
    shapes = [placed.site.shape for placed in delta.placed.values()]
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    assert [shared.b.shape[0], shared.a.shape[1]] == largest
    assert {id(shared)} == {id(placed.patch.projection) for placed in delta.placed.values()}
    assert len(projections(copy.deepcopy(model))) == len(projections(model.double())) == 1


def test_the_matrices_are_those_of_the_seed() -> None:
    state = torch.get_rng_state()
    made = {}
    for seed in (0, 1):
        model, _ = attached("mlp", VeRA(rank=3, seed=seed))
        (made[seed],) = projections(model)
        bound = (6 / made[seed].a.shape[1]) ** 0.5  # Kaiming's
        assert 0.9 * bound < made[seed].a.abs().max() <= bound
    assert not torch.equal(made[0].a, made[1].a)
    assert torch.equal(state, torch.get_rng_state())
    # whatever version of torch draws them: a file relies on it
    drawn = Projection(VeRA(rank=2), 3, 2, torch.device("cpu"))
    close(
        drawn.a, torch.tensor([[-0.010588, 0.758646, -1.163962], [-1.040775, -0.544691, 0.379232]])
    )
    close(drawn.b, torch.tensor([[-0.034317, 1.373325], [-0.153709, 0.458322]]))


def test_the_matrices_are_moved_but_never_cast() -> None:
    model, _ = attached("mlp", VeRA(rank=3))
    (shared,) = projections(model)
    before = bits(shared.a) + bits(shared.b)
    model.bfloat16()
    assert bits(shared.a) + bits(shared.b) == before
    model.to("meta")
    assert shared.a.is_meta and shared.b.is_meta
    model.to_empty(device="cpu")
    assert bits(shared.a) + bits(shared.b) == before


def test_a_plan_and_a_method_left_without_sites_draw_nothing() -> None:
    model = KIND["mlp"].model()
    assert pl.plan(model, VeRA(rank=10**6)).delta.num_parameters > 10**6
    methods = [VeRA(rank=3), pl.LoRA(targets="*")]
    assert "VeRA" not in str(pl.attach(model, methods))
