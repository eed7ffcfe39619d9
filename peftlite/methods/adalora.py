"""AdaLoRA: W' = W + s·P diag(λ) Q, with one budget of ranks that training shares out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlite.core.patch import WeightMethod, trainable
from peftlite.core.site import Site
from peftlite.errors import PeftliteError
from peftlite.fields import integer, number, positive, set_number
from peftlite.methods.low_rank import LowRankPatch
from peftlite.methods.sparse import largest


class AdaLoRAPatch(LowRankPatch):
    """ΔW = s·P diag(λ) Q, with `p` (o, r), `lam` (r), `q` (r, i); stacks keep their stack.

    A triplet is a column of P, its λ and its row of Q. `sensitivity` and `uncertainty`, both
    (r, o + 1 + i), are Ī and Ū of the paper for every number of every triplet.
    """

    method: AdaLoRA
    scale: float
    dropout: float

    unsaved: ClassVar[frozenset[str]] = frozenset({"sensitivity", "uncertainty", "taken"})

    sensitivity: Tensor
    uncertainty: Tensor
    taken: Tensor

    def __init__(self, site: Site, method: AdaLoRA):
        super().__init__(site)
        self.method, self.scale, self.dropout = method, method.scale, method.dropout
        r, how = method.init_rank, {"site": site, "dtype": method.dtype}
        self.p: nn.Parameter = trainable(*self.stack, self.o, r, **how)
        self.lam: nn.Parameter = trainable(*self.stack, r, **how)
        self.q: nn.Parameter = trainable(*self.stack, r, self.i, **how)
        for name in ("sensitivity", "uncertainty"):
            self.register_buffer(name, self.q.data.new_zeros(*self.stack, r, self.o + 1 + self.i))
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64, device=site.device))

    def reset(self, w: Tensor | None) -> None:
        self.p.normal_(std=0.02)
        self.lam.zero_()
        self.q.normal_(std=0.02)

    def factors(self) -> tuple[Tensor, Tensor]:
        own: Any = self._parameters  # nn.Module's attribute access costs as much as a small matmul
        return own["lam"][..., None] * own["q"], own["p"]

    def regularizer(self) -> Tensor | None:
        """γ·(‖PᵀP − I‖² + ‖QQᵀ − I‖²), which keeps the triplets apart."""
        grams = torch.stack([self.p.mT @ self.p, self.q @ self.q.mT])
        identity = torch.eye(self.method.init_rank, dtype=grams.dtype, device=grams.device)
        return self.method.orth_reg_weight * (grams - identity).square().sum()

    @property
    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.p, self.lam, self.q

    def watch(self) -> None:
        """Ī and Ū after one more step: of I = |w·∂loss/∂w|, and of how far I is from Ī."""
        grads = (torch.zeros_like(x) if x.grad is None else x.grad for x in self.triplets)
        # a grad scaler skips a step whose gradients aren't finite
        now = (_rows(*self.triplets) * _rows(*grads)).abs().nan_to_num(0, 0, 0)
        self.sensitivity.lerp_(now, 1 - self.method.beta1)
        self.uncertainty.lerp_((now - self.sensitivity).abs(), 1 - self.method.beta2)

    def importance(self) -> Tensor:
        """S (r): with s = Ī·Ū, s of λ plus the mean s of the column of P and of the row of Q."""
        o, s = self.o, self.sensitivity * self.uncertainty
        return s[..., :o].mean(-1) + s[..., o] + s[..., o + 1 :].mean(-1)


def _rows(p: Tensor, lam: Tensor, q: Tensor) -> Tensor:
    """Each triplet's numbers as a row (o + 1 + i)."""
    return torch.cat([p.mT, lam[..., None], q], -1)


@dataclass(frozen=True)
class AdaLoRA(WeightMethod):
    """W' = W + s·P diag(λ) Q, in the form of an SVD. Zhang et al., arXiv:2303.10512, §3.

    Every matrix begins with `init_rank` triplets: a column of P (o, r), a λ, a row of Q (r, i).
    `delta.step()` sets λ to zero but for the b(t) most important triplets of all matrices taken
    together; call it after every `optimizer.step()` and before the gradients are cleared. A pruned
    λ is not held at zero until the next pruning: its gradient goes on, so a triplet that becomes
    important again comes back. b(t) falls with the cube of the time left, from `init_rank` a matrix
    to `target_rank` (§3.3; the time past is t − t_init as in the authors' code, not the printed
    t − t_init − t_final, with which the budget would begin by rising).

    Add `delta.regularizer()` to the loss: γ·Σ(‖PᵀP − I‖² + ‖QQᵀ − I‖²), squared and summed as in
    the paper (§3.1); peft takes the mean of the norms. By default it takes every weight of a linear
    map but the output head's.

    Ī and Ū, the averages that importance goes by, are in `state_dict()` and not in a file, which
    holds all of P, λ and Q.

    Args:
        total_steps: T, of the whole training.
        init_rank: the rank of every matrix at first.
        target_rank: the mean rank at last.
        t_init: the steps before the budget begins to fall.
        t_final: the steps at the end for which it stays, and importance with it.
        delta_t: the steps from one pruning to the next.
        beta1: of the average Ī of the sensitivity |w·∂loss/∂w|.
        beta2: of the average Ū of |I − Ī|, its uncertainty.
        orth_reg_weight: γ.
        alpha: s = alpha/init_rank. Default: equal to `init_rank`.
        dropout: probability of dropping an input feature of Q, in training.

    Raises:
        PeftliteError: `target_rank` is above `init_rank`, or `total_steps` leaves none between
            `t_init` and `t_final`.
    """

    total_steps: int = field(kw_only=True)
    init_rank: int = integer(12)
    target_rank: int = 8
    t_init: int = integer(0, least=0)
    t_final: int = integer(0, least=0)
    delta_t: int = integer(1)
    beta1: float = number(0.85, float, lambda b: 0 < b < 1, "in (0, 1)")
    beta2: float = number(0.85, float, lambda b: 0 < b < 1, "in (0, 1)")
    orth_reg_weight: float = number(0.5, float, lambda w: 0 <= w < math.inf, "finite, from 0 up")
    alpha: float | None = positive(None)
    dropout: float = number(0.0, float, lambda p: 0 <= p < 1, "in [0, 1)")

    # * 5e-4 to 2.2e-3 for DeBERTaV3-base (×1), in thousands of steps: QingruZhang/AdaLoRA, NLU
    rate: ClassVar[float] = 3
    patch: ClassVar[type[AdaLoRAPatch]] = AdaLoRAPatch

    def __post_init__(self) -> None:
        super().__post_init__()
        most, warmups = self.init_rank, self.t_init + self.t_final
        allowed = f"a whole number from 1 to init_rank, {most}"
        set_number(self, "target_rank", int, lambda r: 1 <= r <= most, allowed)
        allowed = f"a whole number above t_init + t_final, {warmups}"
        set_number(self, "total_steps", int, lambda n: n > warmups, allowed)

    @property
    def scale(self) -> float:
        """s, the factor of the product."""
        return 1.0 if self.alpha is None else self.alpha / self.init_rank

    def budget(self, step: int, matrices: int) -> int:
        """b(t), of all triplets."""
        falling = self.total_steps - self.t_final - self.t_init
        left = min(1.0, max(0.0, 1 - (step - self.t_init) / falling))
        target = self.target_rank * matrices
        return int(target + (self.init_rank * matrices - target) * left**3)

    def step(self, patches: Sequence[Any]) -> None:
        if not patches:
            return
        step, last = int(patches[0].taken) + 1, self.total_steps - self.t_final
        if step < last:
            if all(x.grad is None for patch in patches for x in patch.triplets):
                raise PeftliteError(
                    "AdaLoRA has no gradients to tell what is important by: call delta.step() "
                    "after optimizer.step() and before zero_grad()"
                )
            for patch in patches:
                patch.watch()
        if step >= last or (step > self.t_init and step % self.delta_t == 0):
            matrices = sum(patch.lam.numel() for patch in patches) // self.init_rank
            scores = [patch.importance().reshape(-1) for patch in patches]
            kept = largest(lambda: iter(scores), self.budget(step, matrices))
            for patch, indices in zip(patches, kept, strict=True):
                lam = patch.lam.clone()
                patch.lam.zero_().view(-1)[indices] = lam.take(indices)
        for patch in patches:
            patch.taken += 1
