"""AdaLoRA: its budget, what it prunes and brings back; step by step the same as in peft."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

import peftlite as pl
from peftlite.methods.adalora import AdaLoRA
from tests.cells import close, disturb
from tests.digest import bits
from tests.zoo import KINDS, Kind, seeded

KIND = {kind.name: kind for kind in KINDS}
SMALL = AdaLoRA(init_rank=4, target_rank=2, total_steps=9, t_init=2, t_final=3, delta_t=2, alpha=6)


def loss(kind: Kind, model: nn.Module, step: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    with seeded(step):
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in kind.inputs(3).items()}
    output = kind.run(model, batch)
    return output.square().mean() - output.std()


def train(kind: Kind, model: nn.Module, delta: pl.Delta, optimizer, steps: range) -> list[Tensor]:
    """The ranks after every step: how many λ of every site aren't zero."""
    ranks = []
    for step in steps:
        loss(kind, model, step).backward()
        optimizer.step()
        delta.step()
        optimizer.zero_grad()
        ranks.append(torch.stack([p.patch.lam.count_nonzero() for p in delta.placed.values()]))
    return ranks


def adam(delta: pl.Delta) -> torch.optim.Optimizer:
    return torch.optim.AdamW(delta.parameters(), lr=1e-2)


@pytest.mark.parametrize("name, targets", [("hf_bert", ["query", "value"]), ("mlp", ["0", "2"])])
def test_step_by_step_the_same_in_peft(name: str, targets: list[str]) -> None:
    """ΔW, what is pruned at every step, and the outputs.

    But for two things: peft's s is α/(r + 1e-5), and its r, a parameter, would be trained as well.
    """
    kind = KIND[name]
    ours = kind.model(torch.float64)
    theirs = get_peft_model(
        kind.model(torch.float64),
        AdaLoraConfig(
            target_modules=targets, init_r=4, target_r=2, lora_alpha=6, total_step=9, tinit=2,
            tfinal=3, deltaT=2,
        ),
    )  # fmt: skip
    with seeded(5):
        delta = disturb(pl.attach(ours, replace(SMALL, targets=targets)))
    layers = {
        address: theirs.get_submodule(f"base_model.model.{address.removesuffix('.weight')}")
        for address in delta.placed
    }
    with torch.no_grad():
        for address, layer in layers.items():
            patch = delta.placed[address].patch
            layer.lora_B["default"].copy_(patch.p)
            layer.lora_E["default"].copy_(patch.lam[:, None])
            layer.lora_A["default"].copy_(patch.q)
    assert len(layers) == (4 if name == "hf_bert" else 2)
    optimizer = adam(delta)
    factors = [p for name, p in theirs.named_parameters() if ".lora_" in name]
    other = torch.optim.AdamW(factors, lr=1e-2)
    for step in range(1, 11):
        train(kind, ours, delta, optimizer, range(step, step + 1))
        loss(kind, theirs, step).backward()
        other.step()
        theirs.base_model.update_and_allocate(step)
        other.zero_grad()
        for address, layer in layers.items():
            patch = delta.placed[address].patch
            assert torch.equal(patch.lam == 0, layer.lora_E["default"][:, 0] == 0), step
            change = patch.value(torch.zeros_like(layer.weight))
            close(layer.get_delta_weight("default"), change, 1e-5)
    close(loss(kind, ours, 0), loss(kind, theirs, 0))


def test_the_equation_and_the_importance() -> None:
    """§3.1, and §3.2 by hand: β = .85, two steps, then s(λ) + mean s(P) + mean s(Q)."""
    with seeded(3):
        model, x = nn.Linear(5, 7).double(), torch.randn(4, 5).double()
        delta = disturb(pl.attach(model, replace(SMALL, init_rank=3, t_init=5)))
    patch = delta.placed["weight"].patch
    p, lam, q = (w.detach() for w in patch.triplets)
    close(model.weight - model.weight.raw, 2 * p @ lam.diag() @ q, 1e-12)
    mean, stray = ([torch.zeros_like(w) for w in (p, lam, q)] for _ in range(2))
    for _ in range(2):
        model(x).square().sum().backward()
        for k, w in enumerate((patch.p, patch.lam, patch.q)):
            now = (w * w.grad).abs().detach()
            mean[k] = 0.85 * mean[k] + 0.15 * now
            stray[k] = 0.85 * stray[k] + 0.15 * (now - mean[k]).abs()
        delta.step()
        model.zero_grad()
    s = [a * b for a, b in zip(mean, stray, strict=True)]
    close(patch.importance(), s[1] + s[0].mean(0) + s[2].mean(1), 1e-12)


def test_the_budget_falls_with_the_cube_of_the_time_left() -> None:
    method = AdaLoRA(total_steps=100, t_init=10, t_final=30)
    budget = [method.budget(t, 5) for t in range(101)]
    assert budget[:11] == [60] * 11 and budget[70:] == [40] * 31
    assert budget[40] == int(40 + 20 * 0.5**3) and budget == sorted(budget, reverse=True)


def test_the_budget_is_kept_over_all_matrices_and_the_choice_stays_in_the_end() -> None:
    kind = KIND["gpt"]
    model = kind.model()
    with seeded(2):
        delta = disturb(pl.attach(model, SMALL))
    sites, optimizer = len(delta.placed), adam(delta)
    ranks = train(kind, model, delta, optimizer, range(1, 7))
    totals = [int(r.sum()) for r in ranks]
    assert totals == [4 * sites] * 3 + [SMALL.budget(4, sites)] + [4 * sites] + [2 * sites]
    assert ranks[-1].unique().numel() > 1
    kept = [bits(p.patch.lam != 0) for p in delta.placed.values()]
    averages = [bits(p.patch.sensitivity) for p in delta.placed.values()]
    train(kind, model, delta, optimizer, range(7, 14))
    assert kept == [bits(p.patch.lam != 0) for p in delta.placed.values()]
    assert averages == [bits(p.patch.sensitivity) for p in delta.placed.values()]


def test_a_pruned_triplet_comes_back_when_it_matters_again() -> None:
    model = nn.Linear(4, 6)
    delta = pl.attach(model, AdaLoRA(init_rank=2, target_rank=1, total_steps=1000))
    patch = disturb(delta).placed["weight"].patch
    patch.taken.fill_(990)
    optimizer = torch.optim.SGD(delta.parameters(), lr=1e-3)
    seen = set()
    for important in (0, 1, 0):
        patch.sensitivity.fill_(1.0)
        patch.uncertainty.fill_(1e-9)
        patch.uncertainty[important] = 1e3
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        delta.step()
        optimizer.zero_grad()
        assert patch.lam[important] != 0 and patch.lam[1 - important] == 0
        seen.add(important)
    assert seen == {0, 1}


@pytest.mark.parametrize("name", ["mlp", "experts", "conv1d_hf"])
def test_the_regularizer_is_the_papers_and_makes_triplets_orthonormal(name: str) -> None:
    method = AdaLoRA(init_rank=3, target_rank=2, total_steps=9, targets=lambda _: True)
    delta = disturb(pl.attach(KIND[name].model(), method))
    expected = 0.0
    for placed in delta.placed.values():
        p, _, q = (w.detach() for w in placed.patch.triplets)
        for gram in (p.mT @ p, q @ q.mT):
            each = [gram] if gram.dim() == 2 else gram  # experts: a matrix each
            expected += sum(torch.dist(one, torch.eye(3)).item() ** 2 for one in each)
    assert math.isclose(delta.regularizer().item(), 0.5 * expected, rel_tol=1e-5)
    optimizer = torch.optim.Adam(delta.parameters(), lr=2e-2)
    for _ in range(200):
        optimizer.zero_grad()
        delta.regularizer().backward()
        optimizer.step()
    assert delta.regularizer() < 1e-3


def test_without_gradients_it_says_so_and_one_silent_site_has_none() -> None:
    model, x = KIND["mlp"].model(), torch.randn(3, 10)
    method = AdaLoRA(init_rank=2, target_rank=1, total_steps=5)
    delta = disturb(pl.attach(model, method))
    before = copy.deepcopy(delta.state_dict())
    with pytest.raises(pl.PeftliteError, match=r"before zero_grad\(\)"):
        delta.step()
    assert all(torch.equal(before[key], tensor) for key, tensor in delta.state_dict().items())
    model[0](x).sum().backward()
    delta.placed["0.weight"].patch.q.grad[0, 0] = math.inf  # as before a skipped step
    delta.step()
    assert delta.placed["0.weight"].patch.importance().isfinite().all()
    assert not delta.placed["2.weight"].patch.importance().any()


def test_training_goes_on_from_a_checkpoint_and_a_file_has_no_averages(tmp_path) -> None:
    kind, steps = KIND["gpt"], range(1, 10)
    models = [kind.model() for _ in range(2)]
    deltas = [disturb(pl.attach(model, SMALL)) for model in models]
    optimizers = [adam(delta) for delta in deltas]
    train(kind, models[0], deltas[0], optimizers[0], steps[:5])
    deltas[1].load_state_dict(deltas[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, delta, optimizer in zip(models, deltas, optimizers, strict=True):
        train(kind, model, delta, optimizer, steps[5:])
    assert torch.equal(loss(kind, *models[:1], 0), loss(kind, *models[1:], 0))
    pl.save(deltas[0], tmp_path / "a.safetensors")
    names = {key.partition(":")[2] for key in pl.inspect(tmp_path / "a.safetensors").tensors}
    assert names == {"p", "lam", "q"}
    fresh = kind.model()
    pl.load(fresh, tmp_path / "a.safetensors").requires_grad_()
    assert torch.equal(loss(kind, fresh, 0), loss(kind, models[0], 0))


def test_its_numbers() -> None:
    for wrong, says in (
        ({"target_rank": 13}, "target_rank must be a whole number from 1 to init_rank, 12, not 13"),
        ({"t_init": 60, "t_final": 40}, r"a whole number above t_init \+ t_final, 100, not 100"),
        ({"beta1": 1.0}, r"beta1 must be in \(0, 1\)"),
    ):
        with pytest.raises(pl.PeftliteError, match=says):
            AdaLoRA(total_steps=100, **wrong)
