"""LoRA's options: A frozen (LoRA-FA), B faster (LoRA+), and the starts that go by data."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftlite as pl
from tests.digest import assert_same, digest
from tests.zoo import KINDS, seeded

GPT2 = next(kind for kind in KINDS if kind.name == "hf_gpt2")
LLAMA = next(kind for kind in KINDS if kind.name == "hf_llama")


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def two_layers() -> nn.Module:
    with seeded():
        return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))


def some(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    with seeded(7):
        scale = torch.linspace(0.1, 3, 12)  # inputs that have directions
        return [(torch.randn(9, 12) * scale, torch.randn(9, 8)) for _ in range(n)]


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


def product(delta: pl.Delta, address: str) -> Tensor:
    """s·BA at a site, without what is taken off it."""
    patch = delta.placed[address].patch
    return patch.scale * patch.b @ patch.a


def change(delta: pl.Delta, address: str) -> Tensor:
    placed = delta.placed[address]
    w = placed.site.tensor.detach()
    return (placed.patch.value(w) - w).detach()


# -- LoRA-FA and LoRA+


def test_a_frozen_a_halves_the_parameters_and_keeps_no_input() -> None:
    def saved(model: nn.Module) -> int:
        x, kept = torch.randn(64, 10), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, id):
            model(x)
        return sum(shape == x.shape for shape in kept)

    model = nn.Sequential(nn.Linear(10, 10))
    delta = pl.attach(model, pl.LoRA(rank=2, freeze_a=True, targets="0"))
    assert delta.num_parameters == 20 and saved(model) == 0
    pl.detach(model, "default")
    delta = pl.attach(model, pl.LoRA(rank=2, targets="0"))
    assert delta.num_parameters == 40 and saved(model) == 1


def test_b_learns_faster() -> None:
    delta = pl.attach(two_layers(), [pl.LoRA(rank=2, targets="weight"), pl.BitFit()])
    slow, fast = delta.parameter_groups(1e-3, b_ratio=16)
    assert slow["lr"] == 1e-3 and fast["lr"] == 1.6e-2
    named = {id(p): name.rpartition(":")[2] for name, p in delta.named_parameters()}
    assert {named[id(p)] for p in fast["params"]} == {"b"}
    assert {named[id(p)] for p in slow["params"]} == {"a", "difference"}
    assert [len(g["params"]) for g in delta.parameter_groups(1e-3)] == [4, 2]
    torch.optim.AdamW(delta.parameter_groups(1e-3, b_ratio=16))


# -- starts that go by data


def test_eva_starts_from_the_inputs_first_directions() -> None:
    model, batches = two_layers(), some()
    delta = pl.attach(model, pl.LoRA(rank=3, init="eva", targets="weight"))
    pl.initialize(model, delta, batches, loss=squared)
    x = torch.cat([x for x, _ in batches])
    for address, inputs in (("0.weight", x), ("2.weight", model[:2](x).detach())):
        a, expected = delta.placed[address].patch.a, torch.linalg.svd(inputs).Vh[:3]
        close(a.T @ a, expected.T @ expected)
        assert not change(delta, address).any()


def test_lora_ga_makes_the_first_step_of_full_tuning() -> None:
    """One small step of SGD moves W along its gradient's first 2r directions (theorem 3.1)."""
    model, batch, r, lr = two_layers(), some(1)[0], 2, 1e-4
    before = digest(model)
    squared(model, batch).backward()
    gradient = model[0].weight.grad
    model.zero_grad()
    delta = pl.attach(model, pl.LoRA(rank=r, init="lora_ga", targets="0.weight"))
    pl.initialize(model, delta, [batch], loss=squared)
    assert not change(delta, "0.weight").any()
    squared(model, batch).backward()
    torch.optim.SGD(delta.parameters(), lr=lr).step()
    moved = change(delta, "0.weight") / (-lr * 10**0.5 / 16)
    u, s, v = torch.linalg.svd(gradient, full_matrices=False)
    # B·dA gives the directions r to 2r, dB·A the first r
    close(moved, u[:, : 2 * r] * s[: 2 * r] @ v[: 2 * r], 2e-3)
    pl.detach(model, "default")
    assert_same(before, digest(model))


def test_corda_takes_what_matters_most_to_the_inputs() -> None:
    model, batches = two_layers(), some()
    delta = pl.attach(model, pl.LoRA(rank=4, alpha=3, init="corda", targets="0.weight"))
    pl.initialize(model, delta, batches, loss=squared)
    assert not change(delta, "0.weight").any()
    x = torch.cat([x for x, _ in batches]).double()
    w, c = model._modules["0"]._parameters["weight"].detach().double(), x.T @ x
    u, s, v = torch.linalg.svd(w @ c)
    close(product(delta, "0.weight").double() @ c, u[:, :4] * s[:4] @ v[:4], 1e-3)


@pytest.mark.parametrize("kind", [GPT2, LLAMA], ids=str)
def test_loftq_gives_back_what_quantising_lost(kind: Any) -> None:
    model, batch = kind.model(), kind.batch()
    original, output = model.state_dict(), kind.run(model, batch)
    original = {key: tensor.clone() for key, tensor in original.items()}
    delta = pl.attach(model, pl.LoRA(rank=6, alpha=4, init="loftq"))
    with torch.no_grad():
        for placed in delta.placed.values():
            w = placed.site.whole
            w.copy_((w * 4).round() / 4)
    lost = (kind.run(model, batch) - output).norm()
    pl.initialize(model, delta, original=original)
    assert (kind.run(model, batch) - output).norm() < 0.9 * lost
    for address, placed in delta.placed.items():
        error = original[address] - placed.site.whole
        rest = torch.linalg.svdvals(error)[6:].norm()
        close((error - change(delta, address)).norm(), rest, 1e-4)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_a_real_model_starts_from_its_own_loss(init: str) -> None:
    model, batch = LLAMA.model(), LLAMA.batch(3)
    batch = {**batch, "labels": batch["input_ids"]}
    output = LLAMA.run(model, batch)
    delta = pl.attach(model, pl.LoRA(rank=2, init=init, targets=["q_proj", "down_proj"]))
    first = {name: p.detach().clone() for name, p in delta.named_parameters()}
    pl.initialize(model, delta, [batch])
    assert torch.equal(LLAMA.run(model, batch), output)
    assert all(p.equal(first[n]) == (init == "eva" and n[-1] == "b")
               for n, p in delta.named_parameters())  # fmt: skip
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in delta.parameters()}
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_part_of_a_tensor_goes_by_its_own_inputs_and_gradient() -> None:
    for init in ("eva", "corda", "lora_ga"):
        model = two_layers()
        delta = pl.attach(model, pl.LoRA(rank=2, init=init, targets="0.weight[:, 2:9]"))
        pl.initialize(model, delta, some(), loss=squared)
        patch = delta.placed["0.weight[:, 2:9]"].patch
        assert patch.a.shape == (2, 7) and patch.a.any()
