"""A preference that a program can check: a small GPT writes lines, of which vowels count.

The base has learned two things: after `>` eight letters, few or many of them vowels; after `<` to
count on from a digit. The first is what preferences are about, the second what may be forgotten.
Prompts are kept apart: for training, for choosing the rate, held out for the figures.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import nn

import peftlite as pl
from peftlite.demo.gpt import GPT
from peftlite.train.preference.sampling import Sampling, sample
from peftlite.train.preference.told import tell

VOWELS, OTHERS, LENGTH = "aeio", "bcdfgh", 8
NAT = 0.02  # what a nat of KL costs of the reward, where a rate is chosen
Rows = list[dict[str, Any]]


class Lines(pl.data.ByteTokenizer):
    """A line is an answer."""

    end = (10,)
    pad = 0


CODE = Lines()


def vowels(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """The share of vowels among the first eight letters of an answer."""
    return [sum(a in VOWELS for a in answer[:LENGTH]) / LENGTH for answer in answers]


# -- the data, and a base that has learned it


def words(draw: torch.Generator, count: int) -> list[str]:
    """Eight letters each, one in six of them vowels in half of the lines, three in five else."""
    share = torch.where(torch.rand(count, 1, generator=draw) < 0.5, 1 / 6, 3 / 5)
    is_vowel = torch.rand(count, LENGTH, generator=draw) < share
    picks = torch.randint(12, (count, LENGTH), generator=draw)
    rows = zip(is_vowel.tolist(), picks.tolist(), strict=True)
    kinds = (OTHERS, VOWELS)
    return ["".join(kinds[x][i % len(kinds[x])] for x, i in zip(*row, strict=True)) for row in rows]


@cache
def prompts() -> tuple[list[str], list[str], list[str]]:
    """For training, for choosing the rate, held out."""
    every = ["".join(letters) + "> " for letters in product(VOWELS + OTHERS, repeat=3)]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = [every[i] for i in order]
    return mixed[:640], mixed[640:768], mixed[768:]


def counted(draw: torch.Generator, count: int) -> list[tuple[str, str]]:
    """What may be forgotten: digits that count on."""
    starts = torch.randint(10, (count,), generator=draw).tolist()
    return [(f"{n}< ", "".join(str((n + i) % 10) for i in range(1, LENGTH + 1))) for n in starts]


def base(quick: bool = False) -> GPT:
    """A GPT that writes such lines, and counts."""
    torch.manual_seed(0)
    draw, asked = torch.Generator().manual_seed(1), prompts()[0]
    lines = [*zip(asked * 4, words(draw, 4 * len(asked)), strict=True), *counted(draw, 640)]
    pl.attach(model := GPT(dim=48, layers=2, heads=4), pl.FullTuning(), "base")
    options: Any = {"epochs": 1 if quick else 6, "batch_size": 64, "lr": 5e-3, "progress": False}
    pl.Trainer(model, pl.losses.causal_lm, pl.data.pairs(lines, CODE), **options).fit()
    pl.merge(model, "base")
    plain = GPT(dim=48, layers=2, heads=4)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "peftlite" not in k})
    return plain


def pairs(asked: Sequence[str], seed: int) -> Rows:
    """Two answers as the base has them to each prompt, unless both are as good."""
    draw = torch.Generator().manual_seed(seed)
    left, right = words(draw, len(asked)), words(draw, len(asked))
    scored = zip(asked, left, vowels([], left), right, vowels([], right), strict=True)
    return [
        {"prompt": prompt, "chosen": a if x > y else b, "rejected": b if x > y else a}
        for prompt, a, x, b, y in scored
        if x != y
    ]


def rated(rows: Rows) -> Rows:
    """The same as single answers."""
    return [
        {"prompt": row["prompt"], "response": row[side], "rating": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]


# -- ways to learn


Options = dict[str, Any]
SAMPLED: Options = {"tokenizer": CODE, "max_new_tokens": LENGTH + 1}


def _dpo(model: nn.Module, asked: Sequence[str], options: Options) -> None:
    # plain DPO makes both answers less likely than what nobody wrote: see the notes
    loss = pl.losses.dpo({"sigmoid": 1.0, "sft": 1.0}, beta=0.1)
    data = pl.data.preference(pairs(asked, options["seed"] + 10), CODE)
    pl.Trainer(model, loss, data, epochs=3, **options).fit()


def _kto(model: nn.Module, asked: Sequence[str], options: Options) -> None:
    data = pl.data.ratings(rated(pairs(asked, options["seed"] + 10)), CODE)
    pl.Trainer(model, pl.losses.kto(beta=0.5), data, epochs=2, **options).fit()


def _grpo(model: nn.Module, asked: Sequence[str], options: Options) -> None:
    pl.GRPO(model, vowels, asked, group=8, epochs=1, **SAMPLED, **options).fit()


def _ppo(model: nn.Module, asked: Sequence[str], options: Options) -> None:
    pl.PPO(model, vowels, asked, kl=NAT, iterations=2, epochs=2, **SAMPLED, **options).fit()


WAYS: dict[str, Callable[[nn.Module, Sequence[str], Options], None]] = {
    "DPO": _dpo, "KTO": _kto, "GRPO": _grpo, "PPO": _ppo,
}  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """How a policy learns, with which delta, at which of some rates."""

    way: str
    method: pl.Method
    rates: tuple[float, ...]

    def learn(self, start: GPT, lr: float, seed: int, quick: bool) -> nn.Module:
        """The model whose chosen delta has learned."""
        model = deepcopy(start)
        torch.manual_seed(seed)
        if self.way == "PPO":
            pl.attach(model, [pl.LoRA(rank=4), pl.ScalarHead()], "value")
        pl.attach(model, self.method, "policy")
        options = {"progress": False, "seed": seed, "batch_size": 32, "lr": lr}
        WAYS[self.way](model, prompts()[0][: 64 if quick else 640], options)
        return model

    def best_rate(self, start: GPT, quick: bool) -> float:
        """That of the most reward, less what its KL costs, on prompts that are for this alone."""

        def worth(lr: float) -> float:
            found = seen(self.learn(start, lr, 100, quick), prompts()[1], 100)
            return found.reward - NAT * found.kl

        return max(self.rates[:1] if quick else self.rates, key=worth)


LOW, ALL = (2.5e-3, 5e-3, 1e-2), (3e-4, 1e-3, 3e-3)
POLICIES = {way: Policy(way, pl.LoRA(rank=4), LOW) for way in WAYS}
POLICIES |= {f"{way}, all weights": Policy(way, pl.FullTuning(), ALL) for way in ("DPO", "GRPO")}


# -- what is measured


@dataclass(frozen=True)
class Seen:
    """Of a policy: the mean reward of its answers, nats of KL of an answer to the base, the share
    of pairs that log π/π₀ tells right, and the bits that a digit of counting takes.
    """

    reward: float
    kl: float
    accuracy: float
    bits: float


@torch.no_grad()
def seen(model: nn.Module, asked: Sequence[str], seed: int) -> Seen:
    torch.manual_seed(seed)
    texts, batch = answered(model, asked)
    told = tell(model, batch, None)
    kl = ((told.logps - told.reference) * told.mask).sum(-1).mean()
    compared = pl.data.collate(pl.data.preference(pairs(asked, 999), CODE)[:])
    right = pl.losses.dpo()(model, compared)["reward_accuracy"]
    count = pl.data.pairs(counted(torch.Generator().manual_seed(2), 64), CODE)
    nats = pl.losses.causal_lm(model, pl.data.collate(count[:]))["loss"]
    rewards = vowels(asked, texts)
    bits = float(nats / torch.log(torch.tensor(2.0)))
    return Seen(sum(rewards) / len(rewards), float(kl), float(right), bits)


def answered(model: nn.Module, asked: Sequence[str]) -> tuple[list[str], dict[str, torch.Tensor]]:
    """An answer to each prompt, and the batch that they make."""
    ids = [torch.tensor(CODE.encode(prompt)) for prompt in asked]
    answers = sample(model, [x.tolist() for x in ids], CODE, Sampling(LENGTH + 1))
    examples = [
        {"input_ids": torch.cat([x, y]), "labels": torch.cat([torch.full_like(x, -100), y])}
        for x, y in zip(ids, answers, strict=True)
    ]
    return [CODE.decode(y[y != 10].tolist()) for y in answers], pl.data.collate(examples)
