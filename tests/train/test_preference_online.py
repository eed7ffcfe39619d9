"""GRPO and PPO: what samples is what trains, rewards rise, and it goes on to the bit."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import peftlite as pl
from peftlite.train.preference import sampling
from peftlite.train.preference.sampling import Sampling, digest_of, sample
from tests.train.chats import hf_tokenizer, llama
from tests.train.test_preference import HEADED, Stopping, drawn
from tests.train.tiny import gpt, timeless, values

PROMPTS = ["a", "bc", "d", "efg"]


class Lines(pl.data.ByteTokenizer):
    """A line is an answer."""

    end = (10,)
    pad = 0


def vowels(prompts: Any, answers: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in answer) / 3 for answer in answers]


def early(prompts: Any, answers: Any) -> list[float]:
    """Half for each of two letters that come before the capitals."""
    return [sum(letter < "A" for letter in answer) / 2 for answer in answers]


SETTINGS: dict[str, Any] = {
    "tokenizer": Lines(), "max_new_tokens": 3, "batch_size": 4, "lr": 3e-2, "progress": False,
    "epochs": 2,
}  # fmt: skip


def grpo(model: nn.Module, **options: Any) -> pl.Trainer:
    given = {"group": 4, **SETTINGS, **options}
    return pl.GRPO(model, given.pop("reward", vowels), PROMPTS, **given)


def ppo(model: nn.Module, **options: Any) -> pl.Trainer:
    return pl.PPO(model, vowels, PROMPTS, **{**SETTINGS, "iterations": 2, **options})


def valued() -> nn.Module:
    model = gpt(pl.LoRA(rank=4, targets="*"))
    pl.attach(model, HEADED, "value")
    pl.use(model, "sql")
    return model


def test_a_cache_and_left_padding_change_no_answer() -> None:
    """Greedy, of a model with generate: together as alone, and as without a cache."""
    model, coder = llama(), pl.data.as_tokenizer(hf_tokenizer())
    pl.attach(model, pl.LoRA(rank=2), "sql")
    drawn(model)
    prompts, how = [[5, 6, 7], [8], [9, 10, 11, 12, 13]], Sampling(5, 0.0)
    together = sample(model, prompts, coder, how)
    for prompt, answer in zip(prompts, together, strict=True):
        assert torch.equal(answer, sample(model, [prompt], coder, how)[0])
        assert torch.equal(answer, sampling._by_hand(model, [prompt], coder, how)[0])
    with pl.using(model, None):
        base = sample(model, prompts, coder, how)
    assert [x.tolist() for x in base] != [x.tolist() for x in together]


def test_what_samples_is_what_trains() -> None:
    model = drawn(gpt())
    run = sampling._by_hand

    def of_the_base(model: Any, *given: Any) -> Any:
        with pl.using(model, None):
            return run(model, *given)

    with mock.patch.object(sampling, "_by_hand", of_the_base):
        with pytest.raises(pl.PeftliteError, match="what sampled isn't what trains"):
            grpo(model).fit()
    before = digest_of(model, ("sql",))
    next(iter(pl.deltas(model)["sql"].parameters())).data.add_(1)
    assert digest_of(model, ("sql",)) != before


@pytest.mark.parametrize("how", [
    {}, {"iterations": 2, "loss": pl.losses.grpo("dapo", low=0.2, high=0.28, beta=0.01)},
    {"loss": pl.losses.rloo(), "kl": 0.01},
], ids=["grpo", "dapo", "rloo"])  # fmt: skip
def test_rewards_rise(how: Any) -> None:
    model = gpt(pl.LoRA(rank=4, targets="*"))
    history = grpo(model, epochs=20, group=16, schedule="constant", warmup=0.0, **how).fit()
    rewards = [event["train_reward"] for event in history.events[1:]]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:2]) / 2 + 0.2


def test_ppo_raises_rewards_and_learns_values() -> None:
    model = valued()
    given = {"epochs": 10, "batch_size": 64, "schedule": "constant", "warmup": 0.0, "kl": 0.01}
    given |= {"iterations": 2, "max_new_tokens": 2, "lr": 0.1}
    history = pl.PPO(model, early, PROMPTS * 16, **{**SETTINGS, **given}).fit()
    rewards = [event["train_reward"] for event in history.events[1:]]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:2]) / 2 + 0.1
    assert any(
        p.abs().sum() > 0 for p in pl.deltas(model)["value"].placed["lm_head()"].patch.parameters()
    )


@pytest.mark.parametrize("online", [grpo, ppo])
def test_it_goes_on_to_the_bit_within_a_rollout(online: Any, tmp_path: Path) -> None:
    given = {"iterations": 2, "save_every": 1, **({"target": 0.1} if online is ppo else {})}
    whole = online(first := valued(), **given).fit()
    part = online(second := valued(), folder=tmp_path, **given)
    part.callbacks = [Stopping(part, 1)]
    part.fit()
    rest = online(second := valued(), folder=tmp_path, **given).fit(resume=True)
    assert timeless(rest) == timeless(whole)
    for name in ("sql", "value"):
        for key, value in values(first, name).items():
            assert torch.equal(value, values(second, name)[key])


def test_a_delta_rewards_and_prompts_held_out_are_answered() -> None:
    model = valued()
    trainer = pl.GRPO(model, "value", PROMPTS, ["x", "y"], **{**SETTINGS, "group": 2, "epochs": 1})
    history = trainer.fit()
    assert history.events[-1]["full_valid_reward"] == 0  # as a fresh head says
    assert 1 <= history.events[-1]["full_valid_length"] <= 3


@pytest.mark.parametrize("priced", [False, True])
def test_the_kl_is_told_where_a_reference_runs(priced: bool) -> None:
    """And it is the same whether a step runs the reference, or what was sampled has it."""
    seen = []
    for iterations in (1, 2):
        loss = pl.losses.grpo(beta=0.05 if priced else 0.0)
        history = grpo(drawn(gpt()), val=["x"], loss=loss, iterations=iterations, epochs=1).fit()
        seen.append(history.events[1])
        assert history.events[0]["full_valid_kl"] > 0.001
    assert ["train_kl" in event for event in seen] == [priced] * 2
    if priced:
        assert seen[0]["train_kl"] == pytest.approx(seen[1]["train_kl"], rel=1e-4)


def test_the_best_of_several() -> None:
    torch.manual_seed(0)
    rows = pl.best_of(gpt(), vowels, PROMPTS, 8, tokenizer=Lines(), max_new_tokens=3)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(row["rating"] == pytest.approx(vowels([], [row["response"]])[0]) for row in rows)
    (pair,) = pl.data.pairs([row for row in rows if row["response"].strip()][:1], Lines())
    assert (pair["labels"] != -100).any()
