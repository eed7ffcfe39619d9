"""Equations of losses of pairs: what a policy and its reference say of answers makes (b) losses.

In the docstrings w is the answer that was chosen, l the one that was rejected; for the policy π and
its reference π₀, ρ = log π(y|x)/π₀(y|x); s = f′(e^ρ) is the score of an answer, ρ itself unless
another divergence is asked for; Δ = s_w − s_l; ε is the label smoothing, σ the logistic function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Equation = Callable[["Pairs", Any], Tensor]


@dataclass(frozen=True)
class Pairs:
    """What is known of b pairs of answers.

    Attributes:
        policy, reference: log π(y|x) and log π₀(y|x), (2, b): of those chosen, and those rejected.
        lengths: of the answers in tokens, (2, b).
        scores: f′(e^ρ), (2, b).
        nll: −log π of a token of those chosen, the mean.
    """

    policy: Tensor
    reference: Tensor
    lengths: Tensor
    scores: Tensor
    nll: Tensor

    @property
    def ratios(self) -> Tensor:
        """ρ, (2, b)."""
        return self.policy - self.reference

    @property
    def delta(self) -> Tensor:
        """Δ, (b)."""
        return self.scores[0] - self.scores[1]

    @property
    def mean_delta(self) -> Tensor:
        """Δ of scores a token, (b)."""
        own = self.scores / self.lengths.clamp(min=1)
        return own[0] - own[1]


# -- divergences: f′(e^ρ) out of ρ


def alpha_score(ratios: Tensor, alpha: float) -> Tensor:
    """(e^{(α − 1)ρ} − 1)/(α − 1), for a power of at most e⁸⁰."""
    if abs(alpha - 1) < 1e-6:
        return ratios
    power = ((alpha - 1) * ratios).clamp(max=80.0)
    return (power.exp() - 1) / (alpha - 1)


DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda ratios, _: ratios,
    "forward_kl": lambda ratios, _: 1 - torch.exp(-ratios),
    "js_divergence": lambda ratios, _: math.log(2) + F.logsigmoid(ratios),
    "alpha_divergence": alpha_score,
}
"""f-DPO: Wang et al., arXiv:2309.16240, table 1."""


# -- DPO's family


def smoothed(logits: Tensor, epsilon: float) -> Tensor:
    """−(1 − ε) log σ(z) − ε log σ(−z)"""
    return -(1 - epsilon) * F.logsigmoid(logits) - epsilon * F.logsigmoid(-logits)


def sigmoid(p: Pairs, o: Any) -> Tensor:
    """−(1 − ε) log σ(βΔ) − ε log σ(−βΔ)

    Rafailov et al., arXiv:2305.18290, eq. 7; with ε, conservative DPO, §3 of Mitchell's note on it.
    """
    return smoothed(o.beta * p.delta, o.label_smoothing)


def hinge(p: Pairs, o: Any) -> Tensor:
    """max(0, 1 − βΔ): SLiC, arXiv:2305.10425, as Liu et al., arXiv:2309.06657, have it."""
    return torch.relu(1 - o.beta * p.delta)


def ipo(p: Pairs, o: Any) -> Tensor:
    """(s_w/|w| − s_l/|l| − 1/(2β))²

    Azar et al., arXiv:2310.12036, eq. 17, a token: its authors' results are of this mean.
    """
    return (p.mean_delta - 1 / (2 * o.beta)) ** 2


def exo_pair(p: Pairs, o: Any) -> Tensor:
    """KL(q ‖ (1 − ε, ε)), q = (σ(βΔ), σ(−βΔ)), ε > 0: Ji et al., arXiv:2402.00856, eq. 16."""
    logits, epsilon = o.beta * p.delta, o.label_smoothing
    chosen = logits.sigmoid() * (F.logsigmoid(logits) - math.log1p(-epsilon))
    return chosen + (-logits).sigmoid() * (F.logsigmoid(-logits) - math.log(epsilon))


def nca_pair(p: Pairs, o: Any) -> Tensor:
    """−log σ(βρ_w) − ½ log σ(−βρ_w) − ½ log σ(−βρ_l): Chen et al., arXiv:2402.05369."""
    chosen, rejected = o.beta * p.ratios
    return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2


def robust(p: Pairs, o: Any) -> Tensor:
    """(−(1 − ε) log σ(βΔ) + ε log σ(−βΔ))/(1 − 2ε): Chowdhury et al., arXiv:2403.00409."""
    logits, epsilon = o.beta * p.delta, o.label_smoothing
    clean, flipped = (1 - epsilon) * F.logsigmoid(logits), epsilon * F.logsigmoid(-logits)
    return (flipped - clean) / (1 - 2 * epsilon)


def bco_pair(p: Pairs, o: Any) -> Tensor:
    """−log σ(βρ_w) − log σ(−βρ_l): Jung et al., arXiv:2404.04656, without their shift."""
    chosen, rejected = o.beta * p.ratios
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard(p: Pairs, o: Any) -> Tensor:
    """(ρ_w − 1/(2β))² + (ρ_l + 1/(2β))²

    Wu et al., arXiv:2405.00675, eq. 4.7, with a probability of 1 that w is better.
    """
    chosen, rejected = p.ratios
    return (chosen - 0.5 / o.beta) ** 2 + (rejected + 0.5 / o.beta) ** 2


def aot(p: Pairs, o: Any) -> Tensor:
    """`sigmoid` of the sorted log π(w)/π(l) less the sorted log π₀(w)/π₀(l), over the batch

    Melnyk et al., arXiv:2406.05882, algorithm 1, for pairs.
    """
    policy, reference = (
        each.diff(dim=0)[0].neg().sort().values for each in (p.policy, p.reference)
    )
    return smoothed(o.beta * (policy - reference), o.label_smoothing)


def aot_unpaired(p: Pairs, o: Any) -> Tensor:
    """`sigmoid` of the sorted ρ_w less the sorted ρ_l: arXiv:2406.05882, algorithm 1, unpaired."""
    chosen, rejected = p.ratios.sort(dim=1).values
    return smoothed(o.beta * (chosen - rejected), o.label_smoothing)


def apo_zero(p: Pairs, o: Any) -> Tensor:
    """1 − σ(βρ_w) + σ(βρ_l): D'Oosterlinck et al., arXiv:2408.06266, eq. 7."""
    chosen, rejected = (o.beta * p.ratios).sigmoid()
    return 1 - chosen + rejected


def apo_down(p: Pairs, o: Any) -> Tensor:
    """σ(βρ_w) + 1 − σ(β(ρ_w − ρ_l)): arXiv:2408.06266, eq. 8."""
    chosen, rejected = o.beta * p.ratios
    return chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()


def discopop(p: Pairs, o: Any) -> Tensor:
    """−(1 − m) log σ(z) + m e^{−z} for z = βΔ, m = σ(z/τ): Lu et al., arXiv:2406.08414, eq. 5."""
    logits = o.beta * p.delta
    mixed = torch.sigmoid(logits / o.tau)
    return -F.logsigmoid(logits) * (1 - mixed) + torch.exp(-logits) * mixed


def sft(p: Pairs, o: Any) -> Tensor:
    """−log π of a token that was chosen, the batch's mean: to be mixed in, arXiv:2411.10442."""
    return p.nll.expand(p.policy.shape[1])


def sigmoid_norm(p: Pairs, o: Any) -> Tensor:
    """−log σ(β(s_w/|w| − s_l/|l|)): DPO of means, as in Lambert et al., arXiv:2411.15124."""
    return -F.logsigmoid(o.beta * p.mean_delta)


DPO: dict[str, Equation] = {
    each.__name__: each
    for each in (
        sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired,
        apo_zero, apo_down, discopop, sft, sigmoid_norm,
    )
}  # fmt: skip
SMOOTHED = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired")
"""Those that label smoothing is a part of."""
OF_RATIOS = ("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down")
"""Those that go by ρ, whatever the divergence."""


# -- without a reference: z is the difference of log π(y|x), or of what AlphaPO makes of it


def alpha_reward(logps: Tensor, alpha: float) -> Tensor:
    """(1 − π^{−α})/α, or log π where α is 0: Gupta et al., arXiv:2501.03884."""
    return (1 - torch.exp(-alpha * logps)) / alpha if alpha else logps


CPO: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "sigmoid": lambda z, o: smoothed(o.beta * z, o.label_smoothing),
    "hinge": lambda z, o: torch.relu(1 - o.beta * z),
    "ipo": lambda z, o: (z - 1 / (2 * o.beta)) ** 2,
    "simpo": lambda z, o: smoothed(o.beta * z - o.gamma, o.label_smoothing),
}
"""CPO, Xu et al., arXiv:2401.08417, eq. 3; SimPO, Meng et al., arXiv:2405.14734."""
CPO_SMOOTHED = ("sigmoid", "simpo")
"""Those that label smoothing is a part of."""
MEANS = ("ipo", "simpo")
"""Those that go by the mean log π of a token, not by the sum."""


def log_odds(logps: Tensor) -> Tensor:
    """log p/(1 − p) out of log p, below 0."""
    small = logps < -math.log(2)  # two ways to 1 − p, each exact where it is taken
    rest = torch.where(small, torch.log1p(-logps.exp()), torch.log(-torch.expm1(logps)))
    return logps - rest


def odds_ratio(means: Tensor) -> Tensor:
    """−log σ(log odds_w − log odds_l), (b), for the mean log π of a token (2, b)

    Hong et al., arXiv:2403.07691, eq. 7.
    """
    chosen, rejected = log_odds(means)
    return -F.logsigmoid(chosen - rejected)


def bradley_terry(rewards: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """−log σ(r_w − r_l − m), (b), for rewards (2, b)

    Ouyang et al., arXiv:2203.02155, eq. 1; the margin m of Touvron et al., arXiv:2307.09288, eq. 2.
    """
    return -F.logsigmoid(rewards[0] - rewards[1] - margin)


# -- of single answers, each good or not


def kto(ratios: Tensor, good: Tensor, kl: Tensor, beta: float) -> Tensor:
    """1 − σ(β(ρ − z)) of good answers, 1 − σ(β(z − ρ)) of others, (b); z is the KL to π₀

    Ethayarajh et al., arXiv:2402.01306, eq. 7.
    """
    return 1 - torch.sigmoid(beta * torch.where(good, ratios - kl, kl - ratios))


UNPAIRED: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "kto": kto,
    "apo_zero_unpaired": lambda ratios, good, kl, beta: kto(ratios, good, 0 * kl, beta),
}
"""KTO; and APO of single answers, arXiv:2408.06266, eq. 7, which is the same at z = 0."""
