"""Equations of losses of sampled answers: how far a token's probability may go, and what it earns.

r = π/π_old for a token, or its mean power over an answer; A is the advantage of the answer, or of
the token, over others; n(y) the tokens of an answer. Shapes: b answers of t tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Bounds(NamedTuple):
    """How far r may go: ε and ε′ about 1, and at most δ where A is negative, too."""

    low: float
    high: float
    most: float | None = None


Surrogate = Callable[[Tensor, Tensor, Tensor, Tensor, Any], Tensor]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x (b, t) where the mask (b, t) is 1."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def answer_means(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x (b, t) over each answer's tokens, (b, 1)."""
    return ((x * mask).sum(-1) / mask.sum(-1).clamp(min=1))[:, None]


def k3(logps: Tensor, reference: Tensor) -> Tensor:
    """e^d − d − 1 for d = log π₀ − log π: an estimate of KL(π ‖ π₀) that is never negative

    Schulman's note "Approximating KL divergence"; Shao et al., arXiv:2402.03300, eq. 4.
    """
    d = reference - logps
    return d.exp() - d - 1


# -- what a token loses, (b, t) or (b, 1): of log r, A, log π, the mask, and the loss's settings


def clipped(log_ratio: Tensor, a: Tensor, logps: Tensor, mask: Tensor, o: Any) -> Tensor:
    """−min(min(r, δ) A, clip(r, 1 − ε, 1 + ε′) A)

    PPO, Schulman et al., arXiv:1707.06347, eq. 7; ε′ of DAPO, arXiv:2503.14476; δ of
    INTELLECT-2, arXiv:2505.07291, which bounds r where A is negative, too.
    """
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - o.low, 1 + o.high)
    return -torch.min((ratio if o.most is None else ratio.clamp(max=o.most)) * a, bounded * a)


def cispo(log_ratio: Tensor, a: Tensor, logps: Tensor, mask: Tensor, o: Any) -> Tensor:
    """−min(r, ε′) A log π, no gradient through r: MiniMax-M1, arXiv:2506.13585."""
    return -log_ratio.exp().clamp(max=o.high).detach() * a * logps


def sapo(log_ratio: Tensor, a: Tensor, logps: Tensor, mask: Tensor, o: Any) -> Tensor:
    """−4/τ σ(τ(r − 1)) A, τ by the sign of A: Gao et al., arXiv:2511.20347."""
    tau = torch.where(a > 0, o.tau_up, o.tau_down)
    return -torch.sigmoid(tau * (log_ratio.exp() - 1)) * 4 / tau * a


def vespo(log_ratio: Tensor, a: Tensor, logps: Tensor, mask: Tensor, o: Any) -> Tensor:
    """−φ(w) A log π, φ = w^k e^{λ(1 − w)}, w = Π r, no gradient through φ; k, λ by A's sign

    arXiv:2602.10693.
    """
    total = (log_ratio.detach().clamp(-20, 20) * mask).sum(-1, keepdim=True)
    log_w = total.clamp(math.log(1e-8), 20)
    k, scale = (torch.where(a >= 0, *by_sign) for by_sign in ((2.0, 3.0), (3.0, 2.0)))
    phi = torch.exp(scale + k * log_w - scale * log_w.exp()).nan_to_num(0.0, 0.0, 0.0)
    return -phi * a * logps


SURROGATES: dict[str, Surrogate] = {"cispo": cispo, "sapo": sapo, "vespo": vespo}
"""Those of kinds that aren't clipped as PPO's."""


# -- what is averaged, and over what


def of_answers(loss: Tensor, mask: Tensor, o: Any) -> Tensor:
    """The mean over answers of the mean over tokens: GRPO, arXiv:2402.03300, eq. 3."""
    return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def of_tokens(loss: Tensor, mask: Tensor, o: Any) -> Tensor:
    """The mean over all tokens: DAPO, arXiv:2503.14476."""
    return (loss * mask).sum() / mask.sum().clamp(min=1)


def of_places(loss: Tensor, mask: Tensor, o: Any) -> Tensor:
    """The sum over b · `longest`: Dr. GRPO, Liu et al., arXiv:2503.20783, §3.2."""
    return (loss * mask).sum() / (len(mask) * o.longest)


def of_sums(loss: Tensor, mask: Tensor, o: Any) -> Tensor:
    """The mean over answers of the sum over tokens: LUSPO, arXiv:2602.05261."""
    return (loss * mask).sum(-1).mean()


MEANS: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "grpo": of_answers, "sapo": of_answers, "bnpo": of_tokens, "dapo": of_tokens,
    "cispo": of_tokens, "vespo": of_tokens, "dr_grpo": of_places, "luspo": of_sums,
}  # fmt: skip
"""By kind. bnpo's mean is over the tokens of a micro-batch, dapo's over those of the batch."""
OF_ALL_TOKENS = ("dapo", "cispo", "vespo")


# -- advantages


def group_advantages(rewards: Tensor, scale: str = "group") -> Tensor:
    """(R − mean R)/(std R + 10⁻⁴), (b, n), for n answers to each of b prompts

    Shao et al., arXiv:2402.03300, §4.1.2. The deviation is that of the group, of the whole batch
    (arXiv:2508.08221), or 1 for "none" (Dr. GRPO, arXiv:2503.20783).
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "none" or rewards.shape[1] < 2:
        return centred
    deviation = rewards.std() if scale == "batch" else rewards.std(1, keepdim=True)
    return centred / (deviation + 1e-4)


def leave_one_out(rewards: Tensor) -> Tensor:
    """R less the mean of the others' to the same prompt, (b, n)

    Ahmadian et al., arXiv:2402.14740.
    """
    n = rewards.shape[1]
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (n - 1)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x − mean)/√(var + 10⁻⁸), (b, t), over the tokens of the mask; 0 elsewhere."""
    centred = (x - masked_mean(x, mask)) * mask
    return centred * torch.rsqrt(masked_mean(centred**2, mask) + 1e-8)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> Tensor:
    """A_t = Σ_k (γλ)^k (r_{t+k} + γ V_{t+k+1} − V_{t+k}), (b, t), to the end of each answer

    Schulman et al., arXiv:1506.02438, eq. 16. An answer's tokens are those of the mask, in a row.
    """
    advantages, after = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(after)
    for t in reversed(range(values.shape[1])):
        inside = mask[:, t]
        after = (rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * after) * inside
        advantages[:, t], next_value = after, values[:, t] * inside
    return advantages


def clipped_values(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½ max((V − R)², (clip(V, V_old − ε, V_old + ε) − R)²), (b, t)

    As PPO's implementations have it: Engstrom et al., arXiv:2005.12729, §3, item 1.
    """
    bounded = old + (values - old).clamp(-clip, clip)
    return torch.max((values - returns) ** 2, (bounded - returns) ** 2) / 2


def adapted(coefficient: float, kl: float, target: float, answers: int, horizon: int) -> float:
    """β (1 + clip(KL/target − 1, −0.2, 0.2) · answers/horizon)

    Ziegler et al., arXiv:1909.08593, §2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * answers / horizon)
