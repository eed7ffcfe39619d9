"""A reference that is kept, and one that moves: the same numbers, and to the bit after a stop."""

from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from torch import nn

import peftlite as pl
from peftlite.train.modes import evaluating
from tests.train.test_preference import PAIRS, RATINGS, Stopping, drawn, plain
from tests.train.tiny import gpt, timeless, trainer, values

STEPS = {"epochs": 2, "batch_size": 2, "lr": 2e-2, "val": None}  # eight of them


def weights(model: nn.Module, names: Any) -> list[torch.Tensor]:
    with pl.using(model, names), torch.no_grad(), evaluating(model):
        return [m.weight.clone() for m in model.modules() if isinstance(m, nn.Linear)]


# -- kept


@pytest.mark.parametrize("reference", [None, "other"])
@pytest.mark.parametrize("data", [PAIRS, RATINGS], ids=["pairs", "ratings"])
def test_what_is_kept_is_what_the_same_forward_gives(data: Any, reference: Any) -> None:
    model = drawn(gpt())
    pl.attach(model, pl.LoRA(rank=2), "other")
    drawn(model, "other")
    pl.use(model, "sql")
    kept = pl.keep_reference(model, data, reference, batch_size=3, progress=False)
    loss = pl.losses.kto(reference=reference) if data is RATINGS else pl.losses.dpo()
    named = pl.losses.kto(reference=reference) if data is RATINGS else pl.losses.dpo(
        reference=reference
    )  # fmt: skip
    found = loss(model, pl.data.collate(kept[:]))
    expected = named(model, pl.data.collate(data[:]))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(x["loss"], [*pl.deltas(model)["sql"].parameters()])
             for x in (found, expected)]  # fmt: skip
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_step_on_what_is_kept_runs_the_policy_alone() -> None:
    """And its parts have it, as the examples of a model without any delta do."""
    model = gpt()
    kept = pl.keep_reference(model, PAIRS, progress=False)
    pl.detach(model, "sql")
    bare = pl.keep_reference(model, PAIRS, progress=False)
    model, calls = gpt(), []
    loss = pl.losses.dpo()
    part, _ = kept.split(0.25)
    loss(model, pl.data.collate(part[:2]))
    model.register_forward_pre_hook(lambda _m, args: calls.append(len(args[0])))
    loss(model, pl.data.collate(part[2:4]))
    assert calls == [4]
    for a, b, row in zip(kept, bare, PAIRS, strict=True):
        assert torch.equal(a["chosen"]["reference"], b["chosen"]["reference"])
        assert torch.equal(a["rejected"]["input_ids"], row["rejected"]["input_ids"])
    assert "reference" not in PAIRS[0]["chosen"]


# -- moving


@pytest.mark.parametrize("alpha", [1.0, 0.6], ids=["hard", "soft"])
@pytest.mark.parametrize("method", [pl.LoRA(rank=2), pl.DoRA(rank=2)], ids=["LoRA", "DoRA"])
def test_a_reference_moves_by_the_weights(alpha: float, method: pl.Method) -> None:
    model, seen = gpt(method), []
    base = weights(model, None)
    expected = base

    class Watching(pl.Callback):
        def event(self, event: Any) -> None:
            nonlocal expected
            if event["step"] and event["step"] % 3 == 0:
                now = weights(model, "sql")
                expected = [alpha * w + (1 - alpha) * v for w, v in zip(now, expected, strict=True)]
                seen.append([*zip(weights(model, "reference"), expected, strict=True)])

    loss = pl.losses.moving(pl.losses.dpo(), alpha=alpha, every=3)
    trainer(model, train=PAIRS, loss=loss, callbacks=[Watching()], **STEPS).fit()
    assert len(seen) == 2 and [*pl.deltas(model)] == ["sql", "reference"]
    for a, b in (pair for move in seen for pair in move):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    batch = pl.data.collate(PAIRS[:])
    ratios = (plain(model, batch, "sql") - plain(model, batch, "reference")).sum(-1)
    found = loss(model, batch)["reward_margin"]
    chosen, rejected = ratios.chunk(2)
    torch.testing.assert_close(found, 0.1 * (chosen - rejected).mean(), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(weights(model, None), base, strict=True))


@pytest.mark.parametrize("alpha", [1.0, 0.6], ids=["hard", "soft"])
@pytest.mark.parametrize("after", [2, 5])
def test_it_goes_on_to_the_bit(alpha: float, after: int, tmp_path: Path) -> None:
    """Before its first move and after it, on the model as it was left, and on a fresh one."""

    def run(model: nn.Module, **options: Any) -> pl.Trainer:
        loss = pl.losses.moving(pl.losses.dpo(), alpha=alpha, every=3)
        return trainer(model, train=PAIRS, loss=loss, save_every=1, **STEPS, **options)

    whole = run(first := gpt()).fit()
    part = run(left := gpt(), folder=tmp_path / "left")
    part.callbacks = [Stopping(part, after)]
    part.fit()
    copytree(tmp_path / "left", tmp_path / "fresh")
    for name, model in {"left": left, "fresh": gpt()}.items():
        rest = run(model, folder=tmp_path / name).fit(resume=True)
        assert timeless(rest) == timeless(whole)
        for name in ("sql", "reference"):
            for key, value in values(first, name).items():
                assert torch.equal(value, values(model, name)[key])


def test_a_reference_begins_as_the_loss_has_it() -> None:
    model = gpt()
    pl.attach(model, pl.LoRA(rank=2), "polite")
    drawn(model, "polite")
    pl.use(model, "sql")
    loss = pl.losses.moving(pl.losses.dpo(reference="polite"), alpha=0.5, every=8)
    trainer(model, train=PAIRS, loss=loss, **STEPS).fit()
    both = zip(weights(model, "sql"), weights(model, "polite"), strict=True)
    for found, (a, b) in zip(weights(model, "reference"), both, strict=True):
        torch.testing.assert_close(found, (a + b) / 2, rtol=1e-5, atol=1e-6)
