"""Losses of preferences: trl 1.16's own numbers, the equations' properties, PPO by its paper."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import peftlite as pl
from peftlite.train.preference import clipped, pairs
from tests.train import from_trl

GOLDEN = load_file(from_trl.FILE)
MASK = GOLDEN["mask"]


def dpo(x: dict[str, Tensor], **given: Any) -> Tensor:
    return pl.losses.dpo(**given).of(x["policy"], x["reference"], MASK).mean()


def kto(x: dict[str, Tensor], **given: Any) -> Tensor:
    other = (x["other"] - x["other_reference"]).sum(-1)
    good = x["good"].bool()
    return pl.losses.kto(**given).of(x["policy"], x["reference"], MASK, good, other).mean()


def cpo(x: dict[str, Tensor], **given: Any) -> Tensor:
    return pl.losses.cpo(**given).of(x["policy"], MASK)[0]


def grpo(x: dict[str, Tensor], entropy: float = 0.0, **given: Any) -> Tensor:
    loss = pl.losses.grpo(**{"longest": 9, **given})
    found = loss.of(x["policy"], x["old"], x["advantages"], MASK, x["reference"])
    return found - entropy * clipped.masked_mean(x["entropy"], MASK)


CASES: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    f"{call.__name__} {name}": (call, options)
    for table, call in (
        (from_trl.DPO, dpo), (from_trl.KTO, kto), (from_trl.CPO, cpo), (from_trl.GRPO, grpo)
    )
    for name, options in table.items()
}  # fmt: skip
CASES["orpo"] = lambda x: 0.1 * pl.losses.orpo().of(x["policy"], MASK)[1], {}
CASES["rloo"] = (
    lambda x: pl.losses.rloo().of(x["policy"], x["old"], x["advantages"], MASK).mean(),
    {},
)
for _name, _margin, _centre in (
    ("reward", False, 0.0), ("reward margin", True, 0.0), ("reward centred", True, 0.3)
):  # fmt: skip
    CASES[_name] = (
        lambda x, margin, centre: (
            pl.losses.reward(centre=centre).of(x["rewards"], x["margin"] if margin else 0.0).mean()
        ),
        {"margin": _margin, "centre": _centre},
    )


@pytest.mark.parametrize("name", CASES)
def test_is_what_trl_makes_of_it(name: str) -> None:
    call, options = CASES[name]
    leaf = "rewards" if name.startswith("reward") else "policy"
    x = {**GOLDEN, leaf: GOLDEN[leaf].clone().requires_grad_()}
    loss = call(x, **options)
    loss.mean().backward()
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(loss.mean(), GOLDEN[f"{name}: loss"].mean(), **close)
    gradient = x[leaf].grad
    gradient = gradient if gradient is None or leaf == "rewards" else gradient * MASK
    theirs = GOLDEN[f"{name}: gradient"]
    torch.testing.assert_close(gradient, theirs if leaf == "rewards" else theirs * MASK, **close)


def test_every_kind_is_held_to_trl() -> None:
    kinds = {
        kind for _, options in CASES.values() for kind in [options.get("kind")] if type(kind) is str
    }
    assert {*pairs.DPO, *clipped.MEANS, *pairs.CPO} <= kinds


def test_equal_models_learn_from_every_pair_alike() -> None:
    """Where π is π₀, DPO is log 2 and its gradient is that of −β/2 (log π(w) − log π(l))."""
    logps = GOLDEN["policy"].clone().requires_grad_()
    loss = pl.losses.dpo(beta=0.4).of(logps, GOLDEN["policy"], MASK)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.full((3,), 2.0).log())
    signs = torch.tensor([-1.0] * 3 + [1.0] * 3)[:, None]
    torch.testing.assert_close(logps.grad, 0.2 * signs * MASK)


def test_conservative_dpo_is_a_mean_of_both_ways_round() -> None:
    given = GOLDEN["policy"], GOLDEN["reference"], MASK
    turned = [x.roll(3, 0) for x in given]
    found = pl.losses.dpo(label_smoothing=0.2).of(*given)
    expected = 0.8 * pl.losses.dpo().of(*given) + 0.2 * pl.losses.dpo().of(*turned)
    torch.testing.assert_close(found, expected)


# -- advantages, and PPO against a second, plain implementation


def test_advantages_of_groups() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]])
    found = clipped.group_advantages(rewards)
    torch.testing.assert_close(found[0], torch.tensor([-1.0, 0.0, 1.0]) / (1 + 1e-4))
    assert clipped.group_advantages(torch.ones(2, 4)).eq(0).all()
    assert clipped.group_advantages(rewards, "none").tolist()[1] == [-2, -2, 4]
    assert clipped.leave_one_out(rewards).tolist()[1] == [-3, -3, 6]


def test_gae_is_its_sum() -> None:
    torch.manual_seed(0)
    rewards, values, gamma, lam = torch.randn(3, 6), torch.randn(3, 6), 0.9, 0.8
    mask = (torch.arange(6) < torch.tensor([[6], [3], [1]])).float()
    found = clipped.gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate((6, 3, 1)):
        r, v = rewards[row].tolist(), [*values[row, :length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            plain = sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t))
            assert found[row, t].item() == pytest.approx(plain, abs=1e-5)
    assert found[1, 3:].eq(0).all()


def test_whitened_is_of_mean_0_and_deviation_1() -> None:
    x = clipped.whiten(5 + 3 * torch.randn(6, 7), MASK)[MASK == 1]
    assert x.mean().abs() < 1e-5 and (x.std(correction=0) - 1).abs() < 1e-4


def test_the_coefficient_of_the_kl_follows_its_target() -> None:
    assert clipped.adapted(0.1, 12, 6, 64, 640) == pytest.approx(0.1 * 1.02)
    assert clipped.adapted(0.1, 6, 6, 64, 640) == 0.1
    assert clipped.adapted(0.1, 5.4, 6, 64, 640) == pytest.approx(0.1 * 0.99)


def test_ppo_is_its_paper() -> None:
    x, loss = GOLDEN, pl.losses.ppo(clip=0.2, value_clip=0.1, value_weight=0.3)
    torch.manual_seed(0)
    values, old_values, returns, advantages = torch.randn(4, 6, 7)
    found = loss.of(x["policy"], x["old"], advantages, MASK, values, old_values, returns)
    policy, value, n = 0.0, 0.0, 0
    for i, t in MASK.nonzero().tolist():
        r, a = (x["policy"] - x["old"]).exp()[i, t].item(), advantages[i, t].item()
        policy -= min(r * a, min(max(r, 0.8), 1.2) * a)
        v, o, target = (z[i, t].item() for z in (values, old_values, returns))
        near = o + min(max(v - o, -0.1), 0.1)
        value += max((v - target) ** 2, (near - target) ** 2) / 2
        n += 1
    assert found.item() == pytest.approx((policy + 0.3 * value) / n, rel=1e-5)


# -- the tiled head


def heads() -> dict[str, tuple[Any, bool]]:
    torch.manual_seed(0)
    plain = torch.nn.Linear(8, 50).requires_grad_(False)
    patched = torch.nn.Sequential(torch.nn.Linear(8, 50, bias=False))
    pl.attach(patched, pl.LoRA(rank=2, targets="0.weight"), "sql")
    torch.nn.init.normal_(next(iter(pl.deltas(patched)["sql"].placed.values())).patch.b)
    packed = torch.nn.Sequential(torch.nn.Linear(64, 50, bias=False))
    pl.quantize(packed, "int8", targets="0.weight")
    embed = torch.nn.Embedding(50, 8).requires_grad_(False)
    return {
        "frozen": (plain, False),
        "with a delta": (patched, True),
        "packed": (packed, False),
        "tied": (lambda h: F.linear(h, embed.weight), False),
    }


@pytest.mark.parametrize("name", ["frozen", "with a delta", "packed", "tied"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_tiled_head_is_that_of_all_logits(name: str, temperature: float) -> None:
    head, trained = heads()[name]
    i = 64 if name == "packed" else 8
    labels = torch.randint(50, (3, 9))
    labels[0, :4] = -100
    weights = torch.randn(3, 9)
    found = []
    for tiled in (True, False):
        torch.manual_seed(1)
        h = torch.randn(3, 9, i, requires_grad=True)
        kept = labels != -100
        if tiled:
            options: Any = {"temperature": temperature, "entropy_gradient": trained, "tile": 4}
            logp, entropy = pl.kernels.log_probs(h, head, labels, **options)
        else:
            log_p = F.log_softmax(head(h) / temperature, -1)
            logp = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * kept
            entropy = -(log_p.exp() * log_p).sum(-1) * kept
        parameters = [*pl.deltas(head)["sql"].parameters()] if trained else []
        total = (logp * weights).sum() + (entropy.square().sum() if trained else 0)
        found.append([logp, entropy, *torch.autograd.grad(total, [h, *parameters])])
    for own, full in zip(*found, strict=True):
        torch.testing.assert_close(own, full, rtol=1e-4, atol=1e-5)


def test_no_label_costs_nothing() -> None:
    head = torch.nn.Linear(4, 9).requires_grad_(False)
    h = torch.randn(2, 3, 4, requires_grad=True)
    logp, _ = pl.kernels.log_probs(h, head, torch.full((2, 3), -100))
    logp.sum().backward()
    assert logp.eq(0).all() and h.grad is not None and h.grad.eq(0).all()
