"""GRPO and PPO: a policy answers prompts, its answers are rewarded, and it learns of that.

Each is a `Trainer` whose loss samples: of a batch of prompts it makes a rollout, and of that as
many steps as `iterations` says. So what a Trainer does holds here: it goes on to the bit, reports,
validates on prompts held out, and trains in several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from peftlite.errors import PeftliteError
from peftlite.fields import check_fields, integer, number, one_of, positive
from peftlite.table import short
from peftlite.train.data.checks import check_counts
from peftlite.train.data.packing import IGNORED
from peftlite.train.data.padding import collate
from peftlite.train.data.tokens import Tokenizer, as_tokenizer
from peftlite.train.modes import without_dropout
from peftlite.train.preference import clipped
from peftlite.train.preference.losses import Scale, grpo, ppo, rloo
from peftlite.train.preference.prompts import check_prompts, ids_of
from peftlite.train.preference.sampling import Sampling, sample
from peftlite.train.preference.told import current, last_scalars, scalars, tell
from peftlite.train.trainer import Trainer
from peftlite.verbs.use import using

Reward = str | Callable[[Sequence[Any], Sequence[str]], Sequence[float]]
"""The name of a delta with a `ScalarHead`, or a function of prompts and answers."""

Batch = dict[str, Tensor]


def GRPO(
    model: nn.Module,
    reward: Reward,
    prompts: Sequence[Any],
    val: Sequence[Any] | None = None,
    *,
    loss: grpo | rloo | None = None,
    tokenizer: Any = None,
    group: int = 8,
    scale: Scale = "group",
    kl: float = 0.0,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    iterations: int = 1,
    **options: Any,
) -> Trainer:
    """A `Trainer` by group-relative advantages: A = (R − mean R)/std R over answers to one prompt.

    Shao et al., arXiv:2402.03300. Each step samples `group` answers to every prompt of a batch, by
    the model as it is chosen, with a KV cache where the model has `generate`; the reward says how
    good they are, and `loss` what is learned of it. What samples is asserted to be what trains.

    Args:
        model: whose chosen delta is the policy.
        reward: a function of lists, of prompts and of answers, which gives a number for each; or
            the name of a delta with a `ScalarHead`.
        prompts: texts, or lists of messages.
        val: prompts held out; how answers to them are rewarded is `full_valid_reward`.
        loss: `pl.losses.grpo(...)` of any kind, its base kind if None, or `pl.losses.rloo(...)`,
            whose advantages leave out the answer itself.
        tokenizer: as in `pl.data.chat`, with a token that ends an answer.
        group: answers to a prompt, 2 or more.
        scale: what advantages are divided by: "group", "batch" or "none".
        kl: what a nat away from the reference costs of the reward, with `rloo`.
        max_new_tokens: of an answer.
        temperature: to sample at, above 0.
        iterations: steps that are made of what was sampled once.
        options: of `Trainer`; `batch_size` is of prompts.

    Raises:
        PeftliteError: an argument isn't of these, or prompts aren't.

    Example:
        from peftlite.demo.gpt import GPT

        class Lines(pl.data.ByteTokenizer):
            end, pad = (10,), 0

        model, code = GPT(dim=8, layers=1, heads=1), Lines()
        pl.attach(model, pl.LoRA(rank=2), name="policy")
        vowels = lambda prompts, answers: [sum(a in "aeiou" for a in each) for each in answers]
        how = {"tokenizer": code, "group": 2, "max_new_tokens": 2, "progress": False}
        pl.GRPO(model, vowels, ["b", "c"], batch_size=2, epochs=1, lr=1e-3, **how).fit()
    """
    given = grpo(temperature=temperature) if loss is None else loss
    rollouts = Grouped(
        reward, _asked(prompts, val), as_tokenizer(tokenizer), given,
        Sampling(max_new_tokens, temperature), iterations, kl, group, scale,
    )  # fmt: skip
    return _trainer(model, rollouts, prompts, val, options)


def PPO(
    model: nn.Module,
    reward: Reward,
    prompts: Sequence[Any],
    val: Sequence[Any] | None = None,
    *,
    loss: ppo | None = None,
    tokenizer: Any = None,
    kl: float = 0.05,
    target: float | None = None,
    horizon: int = 10_000,
    gamma: float = 1.0,
    lam: float = 0.95,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    iterations: int = 4,
    **options: Any,
) -> Trainer:
    """A `Trainer` by proximal policy optimization: A by GAE of a value function, r clipped.

    Schulman et al., arXiv:1707.06347. The value function is a delta of the same base with a
    `ScalarHead`, which learns beside the policy, here and in eval. A token's reward is
    −β·log π/π₀, for the base π₀, and the answer's own at its last. Advantages are whitened.

    Args:
        model, reward, prompts, val, tokenizer, max_new_tokens, temperature, iterations, options: as
            of `GRPO`.
        loss: `pl.losses.ppo(...)`, which names the delta of the values: "value".
        kl: β, what a nat away from the base costs.
        target: nats of KL an answer to which β is adapted, arXiv:1909.08593, §2.2; None leaves it.
        horizon: answers over which it is.
        gamma, lam: γ and λ of GAE.

    Raises:
        PeftliteError: an argument isn't of these, prompts aren't, or there is no such delta.

    Example:
        from peftlite.demo.gpt import GPT

        class Lines(pl.data.ByteTokenizer):
            end, pad = (10,), 0

        model, code = GPT(dim=8, layers=1, heads=1), Lines()
        pl.attach(model, [pl.LoRA(rank=2), pl.ScalarHead()], name="value")
        pl.attach(model, pl.LoRA(rank=2), name="policy")
        vowels = lambda prompts, answers: [sum(a in "aeiou" for a in each) for each in answers]
        how = {"tokenizer": code, "max_new_tokens": 2, "progress": False}
        pl.PPO(model, vowels, ["b", "c"], batch_size=2, epochs=1, lr=1e-3, **how).fit()
    """
    given = ppo(temperature=temperature) if loss is None else loss
    rollouts = Valued(
        reward, _asked(prompts, val), as_tokenizer(tokenizer), given,
        Sampling(max_new_tokens, temperature), iterations, kl, target=target,
        horizon=horizon, gamma=gamma, lam=lam,
    )  # fmt: skip
    return _trainer(model, rollouts, prompts, val, options)


def best_of(
    model: nn.Module,
    reward: Reward,
    prompts: Sequence[Any],
    n: int = 8,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
) -> list[dict[str, Any]]:
    """The best of n answers to each prompt: rows `{"prompt", "response", "rating"}`.

    `pl.data.pairs` of those with a rating that is high enough is rejection sampling: Dong et al.,
    arXiv:2304.06767; a delta that learns them, of another's answers, distils that one.

    Args:
        model: as it is chosen.
        reward, prompts, tokenizer, max_new_tokens, temperature: as of `GRPO`.
        n: answers to each.

    Raises:
        PeftliteError: an argument isn't of these, or a reward isn't finite.

    Example:
        from peftlite.demo.gpt import GPT

        class Lines(pl.data.ByteTokenizer):
            end, pad = (10,), 0

        model, code = GPT(dim=8, layers=1, heads=1), Lines()
        pl.attach(model, pl.LoRA(rank=2), name="policy")
        vowels = lambda prompts, answers: [sum(a in "aeiou" for a in each) for each in answers]
        rows = pl.best_of(model, vowels, ["b", "c"], 3, tokenizer=code, max_new_tokens=4)
    """
    check_counts(n=n)
    how = Sampling(max_new_tokens, temperature)
    coder = as_tokenizer(tokenizer)
    rollouts = Best(reward, _asked(prompts), coder, grpo(temperature=temperature), how, 1, 0.0, n)
    check_prompts(model, prompts, coder, max_new_tokens)
    rolled = rollouts.answer(model, list(range(len(prompts))))
    return [
        {"prompt": prompt, "response": rolled.texts[n * i + best], "rating": float(own[best])}
        for i, (prompt, own) in enumerate(zip(prompts, rolled.rewards.view(-1, n), strict=True))
        for best in [int(own.argmax())]
    ]


def _asked(*prompts: Any) -> list[Any]:
    """The prompts of lists. Raises PeftliteError for what is no list."""
    for i, own in enumerate(prompts):
        listed = not isinstance(own, str) and hasattr(own, "__len__") and (i or len(own))
        if not listed and (own is not None or not i):
            raise PeftliteError(f"prompts are a list of texts or chats, not {short(own)}")
    return [prompt for own in prompts if own is not None for prompt in own]


def _trainer(
    model: nn.Module, rollouts: Rollouts, prompts: Any, val: Any, options: dict[str, Any]
) -> Trainer:
    for what, own in {"prompts": prompts, "prompts held out": val or []}.items():
        check_prompts(model, own, rollouts.coder, rollouts.how.max_new_tokens, what)
    if {*rollouts.trains} & {*current(model)}:
        raise PeftliteError(
            f"{rollouts.trains[0]!r} gives the values, and is chosen as the policy, too: pl.use("
            "model, name) of the delta that is to answer"
        )
    whole = Trainer(model, rollouts, Prompts(0, len(prompts)), **options)
    size, n = whole.settings()["batch_size"], len(prompts)
    if n < size:
        raise PeftliteError(f"there are {n} prompts, and a batch has {size}: give a batch_size")
    train = Prompts(0, n, rollouts.iterations, size)
    held = None if val is None else Prompts(n, len(val))
    return Trainer(model, rollouts, train, held, **{**options, "batch_size": size})


@dataclass(eq=False)
class Prompts(Sequence[Batch]):
    """The numbers of prompts, each batch of an epoch as often as steps are made of its rollout."""

    start: int
    many: int
    times: int = 1
    batch_size: int = 1

    def __len__(self) -> int:
        return self.many // self.batch_size * self.batch_size * self.times

    def __getitem__(self, i: Any) -> Any:
        return {"index": torch.tensor(self.start + i)}

    def order(self, generator: Generator) -> list[int]:
        """Of an epoch: whole batches, anew; what is left over waits for another epoch."""
        order = torch.randperm(self.many, generator=generator)
        batches = order[: len(self) // self.times].view(-1, self.batch_size)
        return batches.repeat_interleave(self.times, 0).flatten().tolist()


@dataclass(eq=False)
class Rolled:
    """Answers: their prompts and texts, their rewards (b), and the batch that they make."""

    prompts: list[Any]
    texts: list[str]
    rewards: Tensor
    batch: Batch


@dataclass(eq=False)
class Rollouts:
    """A loss of prompts: the model answers them, and learns of its answers. It has a state."""

    reward: Reward
    prompts: Sequence[Any]
    coder: Tokenizer
    loss: Any
    how: Sampling
    iterations: int = integer(1)
    kl: float = number(0.0, float, lambda x: x >= 0, "0 or above")
    group: int = 1

    kept: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    losses: ClassVar[tuple[type, ...]] = ()  # what it can learn by

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.reward, str) and not callable(self.reward):
            raise PeftliteError(
                "a reward is the name of a delta with a ScalarHead, or a function of two lists, of "
                f"prompts and of answers: not {short(self.reward)}"
            )
        if not isinstance(self.loss, self.losses):
            names = " or ".join(f"pl.losses.{kind.__name__}" for kind in self.losses)
            raise PeftliteError(f"loss= is a {names}, not {short(self.loss)}")
        if not self.how.temperature or self.loss.temperature != self.how.temperature:
            raise PeftliteError(
                f"answers are sampled at temperature {self.how.temperature:g}, and learned of at "
                f"{self.loss.temperature:g}: give both the same, above 0"
            )
        given: Any = getattr(self.coder, "given", self.coder)  # transformers', in ours
        if not hasattr(given, "decode"):
            raise PeftliteError(
                f"what is sampled is to be read, and {short(given)} has no decode: give a "
                "tokenizer of transformers', or pl.data.ByteTokenizer or a class of yours like it"
            )
        self.decode: Callable[[list[int]], str] = given.decode

    @property
    def trains(self) -> tuple[str, ...]:
        """The deltas that learn beside those chosen."""
        return ()

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """What a loss gives; `reward` and `length` are means over answers."""
        numbers, learns = batch["index"].tolist(), torch.is_grad_enabled()
        name = " ".join(map(str, numbers))
        own = self.kept.pop(name, None) or {
            "used": 0,
            "batch": self.roll(model, numbers, not learns),
        }
        with without_dropout(model):
            found = self.loss._measure(model, own["batch"])
        own["used"] += 1
        if learns and own["used"] < self.iterations:
            self.kept[name] = own
        lengths = (own["batch"]["labels"] != IGNORED).sum(-1)
        seen = {"reward": own["batch"]["reward"].mean(), "length": lengths.float().mean()}
        if not learns:  # of prompts held out the mean is over answers
            seen["count"] = len(lengths)
        return {**found, **seen}

    def answer(self, model: nn.Module, numbers: Sequence[int]) -> Rolled:
        """Sampled and rewarded answers to prompts. Raises PeftliteError."""
        prompts = [self.prompts[i] for i in numbers for _ in range(self.group)]
        asked = [ids_of(prompt, self.coder) for prompt in prompts]
        answers = sample(model, asked, self.coder, self.how)
        examples = []
        for ids, answer in zip(asked, answers, strict=True):
            own = torch.tensor(ids, device=answer.device)
            labels = torch.cat([torch.full_like(own, IGNORED), answer])
            examples.append({"input_ids": torch.cat([own, answer]), "labels": labels})
        texts = [self.text(answer) for answer in answers]
        batch = collate(examples, pad=self.coder.pad)
        rewards = self.rewards(model, prompts, texts, batch)
        return Rolled(prompts, texts, rewards, {**batch, "reward": rewards})

    def text(self, answer: Tensor) -> str:
        """What an answer says, without its end."""
        ends = {*self.coder.end, self.coder.pad}
        ids = [i for i in answer.tolist() if i not in ends]
        return self.decode(ids)

    @torch.no_grad()
    def rewards(
        self, model: nn.Module, prompts: Sequence[Any], texts: Sequence[str], batch: Batch
    ) -> Tensor:
        """How good answers are, (b). Raises PeftliteError where that isn't finite."""
        if isinstance(self.reward, str):
            with using(model, self.reward), without_dropout(model):
                found = last_scalars(model, batch)
        else:
            found = _numbers(self.reward(prompts, texts), len(texts)).to(batch["input_ids"].device)
        if not found.isfinite().all():
            i = int((~found.isfinite()).nonzero()[0])
            raise PeftliteError(
                f"the reward of {short(texts[i])}, as an answer to {short(prompts[i])}, is "
                f"{float(found[i])}: it has to be finite"
            )
        return found

    def roll(self, model: nn.Module, numbers: Sequence[int], held_out: bool = False) -> Batch:
        """A batch of answers to prompts, with what its loss takes."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """All that later steps depend on."""
        return {"kept": self.kept, "kl": self.kl}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on, or back, to a state."""
        self.kept, self.kl = {**state["kept"]}, state["kl"]


def _numbers(given: Any, count: int) -> Tensor:
    """What a reward function gave, (b). Raises PeftliteError."""
    try:
        found = torch.as_tensor(given, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.shape != (count,):
        raise PeftliteError(
            f"a reward gives a number for each of {count} answers, not {short(given)}"
        )
    return found


@dataclass(eq=False)
class Grouped(Rollouts):
    """Several answers to each prompt, whose advantages are over one another."""

    losses = (grpo, rloo)
    group: int = integer(8, least=2)
    scale: Scale = one_of("group", Scale)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl and isinstance(self.loss, grpo):
            raise PeftliteError(
                f"kl={self.kl!r} is a part of the reward with pl.losses.rloo; pl.losses.grpo has "
                f"it in the loss: give loss=pl.losses.grpo(beta={self.kl!r})"
            )

    @torch.no_grad()
    def roll(self, model: nn.Module, numbers: Sequence[int], held_out: bool = False) -> Batch:
        rolled = self.answer(model, numbers)
        rewards, batch = rolled.rewards, rolled.batch
        alone = isinstance(self.loss, rloo)
        priced = self.kl if alone else self.loss.beta
        if self.iterations > 1 or (alone and priced) or held_out:
            reference = getattr(self.loss, "reference", None) if priced or held_out else False
            with without_dropout(model):
                told = tell(model, batch, reference, self.how.temperature)
            batch["old"] = F.pad(told.logps, (1, 0))
            if reference is not False:
                batch["reference"] = F.pad(told.reference, (1, 0))
            rewards = rewards - self.kl * ((told.logps - told.reference) * told.mask).sum(-1)
        own = rewards.view(-1, self.group)
        over = clipped.leave_one_out(own) if alone else clipped.group_advantages(own, self.scale)
        return {**batch, "advantages": over.flatten()}


@dataclass(eq=False)
class Best(Grouped):
    """Several answers to each prompt, or one."""

    group: int = integer(8)


@dataclass(eq=False)
class Valued(Rollouts):
    """An answer to each prompt, whose tokens' advantages are over what a value function says."""

    losses = (ppo,)
    target: float | None = positive(None)
    horizon: int = integer(10_000)
    gamma: float = number(1.0, float, lambda x: 0 <= x <= 1, "from 0 to 1")
    lam: float = number(0.95, float, lambda x: 0 <= x <= 1, "from 0 to 1")

    @property
    def trains(self) -> tuple[str, ...]:
        return (self.loss.value,)

    @torch.no_grad()
    def roll(self, model: nn.Module, numbers: Sequence[int], held_out: bool = False) -> Batch:
        rolled = self.answer(model, numbers)
        batch = rolled.batch
        with without_dropout(model):
            told = tell(model, batch, None, self.how.temperature)
            with using(model, self.loss.value):
                values = scalars(model, batch)[:, :-1] * told.mask
        far = (told.logps - told.reference) * told.mask
        last = told.mask.cumsum(-1) == told.mask.sum(-1, keepdim=True)
        rewards = -self.kl * far + rolled.rewards[:, None] * (last * told.mask)
        over = clipped.gae(rewards, values, told.mask, self.gamma, self.lam)
        tokens = {
            "old": told.logps, "reference": told.reference, "values": values,
            "returns": over + values,
            "advantages": clipped.whiten(over, told.mask),
        }  # fmt: skip
        if self.target is not None:
            kl = float(far.sum(-1).mean())
            self.kl = clipped.adapted(self.kl, kl, self.target, len(values), self.horizon)
        return {**batch, **{name: F.pad(x, (1, 0)) for name, x in tokens.items()}}
