"""Losses of preferences: frozen settings that are a function of a model and a batch.

    loss = pl.losses.dpo(beta=0.1)
    loss(model, batch)                 as a `Trainer` calls it
    loss.of(logps, reference, mask)    the equation alone, over log-probabilities

The policy is the model as it is chosen. Its reference is the base, which is the model with its
deltas off, or a frozen delta: both go through one forward, as rows. Nothing is dropped out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peftlite.errors import PeftliteError
from peftlite.fields import check_fields, number, one_of, positive
from peftlite.spelling import Spelled
from peftlite.table import short
from peftlite.train.data.packing import IGNORED
from peftlite.train.data.padding import collate
from peftlite.train.modes import without_dropout
from peftlite.train.preference import clipped, pairs
from peftlite.train.preference.told import Told, check_batch, last_scalars, scalars, tell
from peftlite.verbs.use import Choosable, using

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
Level = Literal["token", "sequence"]
Scale = Literal["group", "batch", "none"]


def share(default: float | None, below: float = 1.0) -> Any:
    """A number from 0 up to, or below, another."""
    return number(default, float, lambda x: 0 <= x <= below, f"from 0 to {below:g}")


@dataclass(frozen=True)
class Preference(Spelled):
    """A loss of preferences; those below are made of it."""

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        """What a loss gives. Raises PeftliteError for a batch of another kind."""
        check_batch(batch)
        with without_dropout(model):
            return self._measure(model, batch)

    def _measure(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The loss, and what goes with it."""
        raise NotImplementedError


def halves(batch: Mapping[str, Tensor]) -> int:
    """How many pairs a batch is of. Raises PeftliteError for one of single answers."""
    if "rating" in batch or len(batch["input_ids"]) % 2:
        raise PeftliteError(
            "this loss takes pairs, the rows of those chosen before those rejected: read them by "
            "pl.data.preference; for single answers there is pl.losses.kto"
        )
    return len(batch["input_ids"]) // 2


def compared(rewards: Tensor) -> dict[str, Tensor]:
    """How rewards (2, b) of answers tell those chosen from those rejected."""
    chosen, rejected = rewards.detach()
    right = (chosen > rejected).to(rewards.dtype).mean()
    return {"reward_accuracy": right, "reward_margin": (chosen - rejected).mean()}


@dataclass(frozen=True)
class dpo(Preference):
    """The mean of −log σ(β(ρ_w − ρ_l)) over pairs, ρ = log π(y|x)/π₀(y|x); or one of its family.

    Rafailov et al., arXiv:2305.18290. The equations of all kinds, with their sources, are in
    `peftlite/train/preference/pairs.py`; each is held to trl 1.16's.

    Args:
        kind: "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
            "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft" or "sigmoid_norm"; or
            several with their weights, `{"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}`.
        beta: β, how dear it is to leave the reference.
        label_smoothing: ε, the share of pairs that are the wrong way round; of "sigmoid", "aot",
            "aot_unpaired", "robust" (below ½) and "exo_pair" (above 0; 10⁻³ in its paper).
        divergence: from the reference, f′(π/π₀) in place of ρ: arXiv:2309.16240.
        alpha: of "alpha_divergence".
        ld_alpha: what tokens count for that come after the shorter answer's length: LD-DPO,
            arXiv:2409.06411. None counts all alike.
        tau: of "discopop".
        reference: a frozen delta's name, several, or None for the base.

    Raises:
        PeftliteError: a setting isn't one of these, or none that the kind has.

    Example:
        pairs = pl.data.preference([{"prompt": "1 + 2 = ", "chosen": "3", "rejected": "4"}])
        model = nn.Sequential(nn.Embedding(264, 4), nn.Linear(4, 4), nn.Linear(4, 264))
        pl.attach(model, pl.LoRA(rank=2), name="polite")
        pl.losses.dpo(beta=0.1)(model, pl.data.collate(pairs[:]))["loss"].backward()
    """

    kind: str | Mapping[str, float] = "sigmoid"
    beta: float = positive(0.1)
    label_smoothing: float = number(0.0, float, lambda x: 0 <= x < 0.5, "in [0, 0.5)")
    divergence: Divergence = one_of("reverse_kl", Divergence)
    alpha: float = positive(0.5)
    ld_alpha: float | None = share(None)
    tau: float = positive(0.05)
    reference: Choosable = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weights(self.kind)
        for kind in self.weights:
            if kind not in pairs.DPO:
                raise PeftliteError(f"no kind {kind!r}: there are {', '.join(pairs.DPO)}")
            if self.divergence != "reverse_kl" and kind in pairs.OF_RATIOS:
                raise PeftliteError(
                    f"{kind} goes by log-ratios, so divergence={self.divergence!r} has no meaning "
                    "there: leave it out"
                )
        if self.label_smoothing and not {*self.weights} & {*pairs.SMOOTHED}:
            raise PeftliteError(
                f"label_smoothing is a part of {', '.join(pairs.SMOOTHED)}, and not of "
                f"{', '.join(self.weights)}: leave it out"
            )
        if "exo_pair" in self.weights and not self.label_smoothing:
            raise PeftliteError("exo_pair divides by label_smoothing: give one, such as 1e-3")

    @property
    def weights(self) -> Mapping[str, float]:
        """The kinds, each with its weight."""
        return {self.kind: 1.0} if isinstance(self.kind, str) else self.kind

    def of(self, logps: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
        """The losses (b) of pairs.

        Args:
            logps, reference: log π and log π₀ of the tokens of answers, (2·b, t): of all that were
                chosen, then of those that were rejected.
            mask: 1 for a token of an answer, (2·b, t).
        """
        return self._losses(self._pairs(logps, reference, mask))

    def _pairs(self, logps: Tensor, reference: Tensor, mask: Tensor) -> pairs.Pairs:
        """What the equations go by, of tokens (2·b, t)."""
        lengths = mask.sum(-1).unflatten(0, (2, -1))
        weights = mask if self.ld_alpha is None else desensitised(mask, lengths, self.ld_alpha)
        policy, base = ((x * weights).sum(-1).unflatten(0, (2, -1)) for x in (logps, reference))
        scores = pairs.DIVERGENCES[self.divergence](policy - base, self.alpha)
        chosen = mask.chunk(2)[0]
        nll = -clipped.masked_mean(logps.chunk(2)[0], chosen)
        return pairs.Pairs(policy, base, lengths, scores, nll)

    def _losses(self, found: pairs.Pairs) -> Tensor:
        """The weighted sum of the kinds, (b)."""
        return sum(w * pairs.DPO[kind](found, self) for kind, w in self.weights.items())  # type: ignore

    def _measure(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The loss, how far rewards β·ρ tell the pairs apart, and how far π has gone."""
        halves(batch)
        told = tell(model, batch, self.reference)
        found = self._pairs(told.logps, told.reference, told.mask)
        return {
            "loss": self._losses(found).mean(),
            **compared(self.beta * found.ratios),
            "chosen_reward": self.beta * found.ratios[0].mean().detach(),
        }


def _check_weights(kind: Any) -> None:
    """Raises PeftliteError unless it is a name, or names with weights."""
    given = {kind: 1.0} if isinstance(kind, str) else kind
    weighted = isinstance(given, Mapping) and all(
        isinstance(w, int | float) and math.isfinite(w) for w in given.values()
    )
    if not given or not weighted:
        raise PeftliteError(
            'kind is a name, or a dict of several with their weights, such as {"sigmoid": 0.8, '
            f'"sft": 1.0}}: not {short(kind)}'
        )


def desensitised(mask: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """The mask (2·b, t), with α for tokens after as many as both answers of a pair have."""
    shared = lengths.amin(0).repeat(2)[:, None]
    return mask * torch.where(mask.cumsum(-1) <= shared, 1.0, alpha)


@dataclass(frozen=True)
class kto(Preference):
    """The mean of w(1 − σ(±β(ρ − z))) over answers: + and w₊ for good ones, − and w₋ for others.

    z, at least 0, is the mean ρ of other prompts' answers, which says how far π is from π₀ anyway;
    it takes another forward, and a micro-batch of two answers or more. Ethayarajh et al.,
    arXiv:2402.01306. "apo_zero_unpaired" does without z, arXiv:2408.06266.

    Args:
        kind: "kto" or "apo_zero_unpaired".
        beta: β.
        desirable, undesirable: w₊ and w₋; the paper has w₊n₊/(w₋n₋) between 1 and 4/3, for so many.
        reference: as of `dpo`.

    Raises:
        PeftliteError: a setting isn't one of these.

    Example:
        rows = [{"prompt": "1 + 2 = ", "response": str(n), "rating": n == 3} for n in (3, 4)]
        model = nn.Sequential(nn.Embedding(264, 4), nn.Linear(4, 4), nn.Linear(4, 264))
        pl.attach(model, pl.LoRA(rank=2), name="polite")
        pl.losses.kto()(model, pl.data.collate(pl.data.ratings(rows)[:]))["loss"].backward()
    """

    kind: Literal["kto", "apo_zero_unpaired"] = one_of("kto", Literal["kto", "apo_zero_unpaired"])
    beta: float = positive(0.1)
    desirable: float = positive(1.0)
    undesirable: float = positive(1.0)
    reference: Choosable = None

    def of(
        self,
        logps: Tensor,
        reference: Tensor,
        mask: Tensor,
        good: Tensor,
        other: Tensor | None = None,
    ) -> Tensor:
        """The losses (b) of answers.

        Args:
            logps, reference: log π and log π₀ of their tokens, (b, t).
            mask: 1 for a token of an answer, (b, t).
            good: whether an answer is good, (b).
            other: ρ of answers to other prompts, (b), of whose mean z is made; None for 0.
        """
        ratios = ((logps - reference) * mask).sum(-1)
        z = ratios.new_zeros(()) if other is None else other.mean().clamp(min=0)
        weights = torch.where(good, self.desirable, self.undesirable)
        return weights * pairs.UNPAIRED[self.kind](ratios, good, z, self.beta)

    def _measure(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The loss, and the rewards β·ρ of good answers and of others."""
        if "rating" not in batch:
            raise PeftliteError(
                "kto takes answers with a rating each: read them by pl.data.ratings"
            )
        kept = "reference" in batch  # but not of answers to other prompts
        told, other = tell(model, batch, None if kept else self.reference), None
        if self.kind == "kto":
            with torch.no_grad():
                apart = tell(model, mismatched(batch), self.reference)
            other = ((apart.logps - apart.reference) * apart.mask).sum(-1)
        good = batch["rating"] > 0
        rewards = self.beta * ((told.logps.detach() - told.reference) * told.mask).sum(-1)
        signs = torch.where(good, 1.0, -1.0)
        return {
            "loss": self.of(told.logps, told.reference, told.mask, good, other).mean(),
            "reward_margin": 2 * (rewards * signs).mean(),
            "kl": rewards.new_zeros(()) if other is None else other.mean().clamp(min=0),
        }


def mismatched(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The prompt of each row with the answer of the next one."""
    ids, labels = batch["input_ids"], batch["labels"]
    there = batch.get("attention_mask", torch.ones_like(ids)).bool()
    learned = labels != IGNORED
    before = learned.cumsum(1) == 0
    examples = []
    for i in range(len(ids)):
        j = (i + 1) % len(ids)
        prompt, answer = ids[i][before[i] & there[i]], ids[j][learned[j]]
        own = torch.cat([prompt.new_full(prompt.shape, IGNORED), answer])
        examples.append({"input_ids": torch.cat([prompt, answer]), "labels": own})
    return collate(examples)


@dataclass(frozen=True)
class orpo(Preference):
    """The mean of −log π(y_w) a token, and of −λ log σ(log odds_w − log odds_l): no reference.

    odds = p/(1 − p), for p the geometric mean of an answer's tokens. Hong et al., arXiv:2403.07691.
    The first term is of the tokens that are learned; trl's has the prompt in it, too.

    Args:
        beta: λ.

    Raises:
        PeftliteError: it isn't above 0.
    """

    beta: float = positive(0.1)

    def of(self, logps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The mean −log π of a token that was chosen, a scalar, and −log σ of the odds' ratio, (b).

        Args:
            logps: log π of the tokens of answers, (2·b, t), as in `dpo.of`.
            mask: 1 for a token of an answer, (2·b, t).
        """
        means = clipped.answer_means(logps, mask)[:, 0].unflatten(0, (2, -1))
        nll = -clipped.masked_mean(logps.chunk(2)[0], mask.chunk(2)[0])
        return nll, pairs.odds_ratio(means)

    def _measure(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The loss, its first term, and how far log π a token tells the pairs apart."""
        halves(batch)
        told = tell(model, batch)
        nll, ratio = self.of(told.logps, told.mask)
        means = clipped.answer_means(told.logps, told.mask)[:, 0].unflatten(0, (2, -1))
        return {"loss": nll + self.beta * ratio.mean(), "nll": nll.detach(), **compared(means)}


@dataclass(frozen=True)
class cpo(Preference):
    """The mean of −log σ(β(log π(w) − log π(l))), and of −λ log π(w) a token: no reference.

    Xu et al., arXiv:2401.08417. "simpo" goes by the mean log π of a token, and a margin:
    −log σ(β(log π(w)/|w| − log π(l)/|l|) − γ), Meng et al., arXiv:2405.14734, with λ = 0.

    Args:
        kind: "sigmoid", "hinge", "ipo" or "simpo".
        beta: β; 2 to 10 for "simpo".
        label_smoothing: ε, of "sigmoid" and "simpo".
        gamma: γ, of "simpo".
        nll: λ.
        alpha: α of AlphaPO, (1 − π^{−α})/α in place of log π, arXiv:2501.03884; 0 is log π.

    Raises:
        PeftliteError: a setting isn't one of these.
    """

    kind: Literal["sigmoid", "hinge", "ipo", "simpo"] = one_of(
        "sigmoid", Literal["sigmoid", "hinge", "ipo", "simpo"]
    )
    beta: float = positive(0.1)
    label_smoothing: float = number(0.0, float, lambda x: 0 <= x < 0.5, "in [0, 0.5)")
    gamma: float = number(0.5, float, lambda x: x >= 0, "0 or above")
    nll: float = number(1.0, float, lambda x: x >= 0, "0 or above")
    alpha: float = number(0.0, float, lambda x: x == x, "a number")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing and self.kind not in pairs.CPO_SMOOTHED:
            raise PeftliteError(
                f"label_smoothing is a part of {', '.join(pairs.CPO_SMOOTHED)}, and not of "
                f"{self.kind}: leave it out"
            )

    def of(self, logps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The losses (b) of pairs, and the mean −log π of a token that was chosen, a scalar.

        Args:
            logps: log π of the tokens of answers, (2·b, t), as in `dpo.of`.
            mask: 1 for a token of an answer, (2·b, t).
        """
        own = pairs.alpha_reward(self._answers(logps, mask), self.alpha)
        nll = -clipped.masked_mean(logps.chunk(2)[0], mask.chunk(2)[0])
        return pairs.CPO[self.kind](own[0] - own[1], self), nll

    def _answers(self, logps: Tensor, mask: Tensor) -> Tensor:
        """log π of answers, or its mean a token, (2, b), for tokens (2·b, t)."""
        sums = (logps * mask).sum(-1)
        own = sums / mask.sum(-1).clamp(min=1) if self.kind in pairs.MEANS else sums
        return own.unflatten(0, (2, -1))

    def _measure(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The loss, and how far log π tells the pairs apart."""
        halves(batch)
        told = tell(model, batch)
        losses, nll = self.of(told.logps, told.mask)
        own = self.beta * self._answers(told.logps, told.mask)
        return {"loss": losses.mean() + self.nll * nll, "nll": nll.detach(), **compared(own)}


@dataclass(frozen=True)
class reward(Preference):
    """The mean of −log σ(r_w − r_l − m) + c(r_w + r_l)² over pairs, r the reward of an answer

    Bradley and Terry's model, as Ouyang et al., arXiv:2203.02155, eq. 1, have it; the margin m is
    the pair's own, arXiv:2307.09288, eq. 2, 0 where it has none; c centres rewards at 0,
    arXiv:2312.09244. A reward is what a delta with a `ScalarHead` gives at the last token.

    Args:
        centre: c.

    Raises:
        PeftliteError: it is below 0.
    """

    centre: float = number(0.0, float, lambda x: x >= 0, "0 or above")

    def of(self, rewards: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        """The losses (b) of pairs.

        Args:
            rewards: of all that were chosen, then of those that were rejected, (2·b).
            margin: m, of each pair, (b).
        """
        own = rewards.unflatten(0, (2, -1))
        return pairs.bradley_terry(own, margin) + self.centre * own.sum(0) ** 2

    def _measure(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The loss, and how far rewards tell the pairs apart."""
        halves(batch)
        rewards = last_scalars(model, batch)
        losses = self.of(rewards, batch.get("margin", 0.0))
        return {"loss": losses.mean(), **compared(rewards.unflatten(0, (2, -1)))}


@dataclass(frozen=True)
class grpo(Preference):
    """What sampled answers lose: −min(rA, clip(r, 1 − ε, 1 + ε′)A) a token, r = π/π_old; + β·KL.

    A is an answer's advantage over others to the same prompt. The kinds differ in what bounds r and
    in what is averaged over what: `peftlite/train/preference/clipped.py` has the equations and
    their sources, each held to trl 1.16's. `pl.GRPO` samples, rewards, and trains with it.

    Args:
        kind: "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo" or "vespo".
        level: "token", or "sequence" for one r an answer, the geometric mean: GSPO,
            arXiv:2507.18071.
        low, high: ε and ε′; `high` is `low` if None, and 5 for "cispo".
        most: a bound of r where A is negative, too; None for none.
        beta: β; the KL is estimated by e^d − d − 1, d = log π₀/π.
        longest: tokens of the longest answer there could be, of "dr_grpo".
        tau_up, tau_down: of "sapo".
        entropy: what is paid for a nat of entropy a token.
        temperature: that answers were sampled at: π and π₀ are at it, too.
        reference: as of `dpo`.

    Raises:
        PeftliteError: a setting isn't one of these, or is missing.
    """

    kind: str = "grpo"
    level: Level = one_of("token", Level)
    low: float = positive(0.2)
    high: float | None = positive(None)
    most: float | None = positive(None)
    beta: float = number(0.0, float, lambda x: x >= 0, "0 or above")
    longest: int | None = number(None, int, lambda n: n > 0, "a whole number from 1 up")
    tau_up: float = positive(1.0)
    tau_down: float = positive(1.05)
    entropy: float = number(0.0, float, lambda x: x >= 0, "0 or above")
    temperature: float = positive(1.0)
    reference: Choosable = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in clipped.MEANS:
            raise PeftliteError(f"no kind {self.kind!r}: there are {', '.join(clipped.MEANS)}")
        if self.kind == "dr_grpo" and self.longest is None:
            raise PeftliteError("dr_grpo divides by the longest answer there could be: longest=")
        if self.high is None:
            object.__setattr__(self, "high", 5.0 if self.kind == "cispo" else self.low)

    def of(
        self,
        logps: Tensor,
        old: Tensor,
        advantages: Tensor,
        mask: Tensor,
        reference: Tensor | None = None,
    ) -> Tensor:
        """The mean loss, a scalar.

        Args:
            logps, old, reference: log π, log π_old and log π₀ of tokens, (b, t).
            advantages: of answers, (b), or of tokens, (b, t).
            mask: 1 for a token of an answer, (b, t).
        """
        log_ratio = logps - old
        if self.level == "sequence":
            log_ratio = clipped.answer_means(log_ratio, mask)
        a = advantages[:, None] if advantages.dim() == 1 else advantages
        surrogate = clipped.SURROGATES.get(self.kind, clipped.clipped)
        if self.kind == "vespo":
            log_ratio = logps - old
        loss = surrogate(log_ratio, a, logps, mask, self)
        if self.beta and reference is not None:
            loss = loss + self.beta * clipped.k3(logps, reference)
        return clipped.MEANS[self.kind](loss, mask, self)

    def _measure(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The loss, and what was sampled: KL, entropy, and how many tokens have r out of bounds."""
        reference = self.reference if self.beta and "reference" not in batch else False
        advantages = of_rollout(batch, "advantages")
        told = tell(model, batch, reference, self.temperature, self.entropy > 0)
        old = told.logps.detach() if "old" not in batch else batch["old"][:, 1:].to(told.logps)
        a = advantages[:, 1:] if advantages.dim() == 2 else advantages
        loss = self.of(told.logps, old, a, told.mask, told.reference)
        if self.entropy:
            loss = loss - self.entropy * clipped.masked_mean(told.entropy, told.mask)
        of_tokens = self.kind in clipped.OF_ALL_TOKENS
        return {
            "loss": loss,
            "count": told.mask.sum() if of_tokens else len(told.mask),
            **sampled(told, old, self.low, self.high or self.low),
            **({"kl": away(told)} if self.beta or "reference" in batch else {}),
        }


def of_rollout(batch: Mapping[str, Tensor], name: str) -> Tensor:
    """What a batch of sampled answers has. Raises PeftliteError for one of another kind."""
    if name not in batch:
        raise PeftliteError(
            f"this loss goes by sampled answers, and the batch has no {name!r} of any: pl.GRPO and "
            "pl.PPO sample and reward them; for pairs there is pl.losses.dpo"
        )
    return batch[name]


def sampled(told: Told, old: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """What is to be seen of sampled answers: means over their tokens."""
    with torch.no_grad():
        ratio = (told.logps - old).exp()
        outside = ((ratio < 1 - low) | (ratio > 1 + high)).to(ratio)
        return {
            "entropy": clipped.masked_mean(told.entropy, told.mask),
            "clipped": clipped.masked_mean(outside, told.mask),
        }


def away(told: Told) -> Tensor:
    """How far a token is from the reference, in nats."""
    with torch.no_grad():
        return clipped.masked_mean(clipped.k3(told.logps, told.reference), told.mask)


@dataclass(frozen=True)
class rloo(Preference):
    """The mean of −min(rA, clip(r, 1 − ε, 1 + ε′)A) over answers, r = π(y)/π_old(y)

    A is a reward less the mean of the others' to the same prompt: Ahmadian et al.,
    arXiv:2402.14740. The KL to the reference is a part of the reward.

    Args:
        low, high: ε and ε′; `high` is `low` if None.
        temperature: as of `grpo`.

    Raises:
        PeftliteError: a setting isn't one of these.
    """

    low: float = positive(0.2)
    high: float | None = positive(None)
    temperature: float = positive(1.0)

    most: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high is None:
            object.__setattr__(self, "high", self.low)

    def of(self, logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """The losses (b) of answers.

        Args:
            logps, old: log π and log π_old of tokens, (b, t).
            advantages: of answers, (b).
            mask: 1 for a token of an answer, (b, t).
        """
        log_ratio = ((logps - old) * mask).sum(-1)
        return clipped.clipped(log_ratio, advantages, logps, mask, self)

    def _measure(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The loss, and what was sampled, as of `grpo`."""
        advantages = of_rollout(batch, "advantages")
        told = tell(model, batch, False, self.temperature)
        old = told.logps.detach() if "old" not in batch else batch["old"][:, 1:].to(told.logps)
        losses = self.of(told.logps, old, advantages, told.mask)
        seen = sampled(told, old, self.low, self.high or self.low)
        seen |= {"kl": away(told)} if "reference" in batch else {}
        return {"loss": losses.mean(), "count": len(losses), **seen}


@dataclass(frozen=True)
class ppo(Preference):
    """The mean over tokens of −min(rA, clip(r, 1 − ε, 1 + ε)A) + c·½ max((V − R)², (V_ε − R)²)

    V_ε is V within ε_V of what it was when the answer was sampled; R = A + V_old before A is
    whitened. Schulman et al., arXiv:1707.06347, eq. 7 and 9. `pl.PPO` samples, rewards, and trains
    with it; V is what the delta `value` says, whose head is a `ScalarHead`.

    Args:
        clip: ε.
        value_clip: ε_V.
        value_weight: c.
        temperature: as of `grpo`.
        value: the name of the delta that gives V.

    Raises:
        PeftliteError: a setting isn't one of these.
    """

    clip: float = positive(0.2)
    value_clip: float = positive(0.2)
    value_weight: float = positive(0.1)
    temperature: float = positive(1.0)
    value: str = "value"

    def of(
        self,
        logps: Tensor,
        old: Tensor,
        advantages: Tensor,
        mask: Tensor,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
    ) -> Tensor:
        """The mean loss, a scalar; all of tokens, (b, t).

        Args:
            logps, old: log π and log π_old.
            advantages: A.
            mask: 1 for a token of an answer.
            values, old_values, returns: V, V_old and R.
        """
        bounds = clipped.Bounds(self.clip, self.clip)
        policy = clipped.clipped(logps - old, advantages, logps, mask, bounds)
        value = clipped.clipped_values(values, old_values, returns, self.value_clip)
        return clipped.masked_mean(policy + self.value_weight * value, mask)

    def _measure(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The loss, and what was sampled, as of `grpo`; and how far V is from R."""
        of_rollout(batch, "returns")
        told = tell(model, batch, False, self.temperature)
        with using(model, self.value):
            values = scalars(model, batch)[:, :-1]
        old, advantages, before, returns = (
            of_rollout(batch, name)[:, 1:] for name in ("old", "advantages", "values", "returns")
        )
        loss = self.of(told.logps, old, advantages, told.mask, values, before, returns)
        far = clipped.masked_mean((values.detach() - returns) ** 2, told.mask)
        seen = sampled(told, old, self.clip, self.clip)
        seen |= {"kl": away(told)} if "reference" in batch else {}
        return {"loss": loss, "count": told.mask.sum(), **seen, "value_error": far}
