"""LoRA: W' = W + s·BA, a trainable product of low rank beside every weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peftlite.core import maps
from peftlite.core.patch import Patch, trainable
from peftlite.core.site import Site
from peftlite.core.tensors import wide
from peftlite.errors import TargetError
from peftlite.fields import number, one_of
from peftlite.methods.low_rank import LowRankPatch, RankMethod

Scaling = Literal["alpha/r", "rslora"]
Init = Literal[
    "kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "lora_ga", "corda", "loftq"
]


class LoRAPatch(LowRankPatch):
    """ΔW = s·(BA − B₀A₀), with `a` (r, i) and `b` (o, r); stacks of matrices keep their stack.

    B₀A₀ is there for the inits whose factors aren't nothing (PiSSA, OLoRA, LoRA-GA, CorDA): it is
    fixed, so that a fresh delta changes nothing and the base is never rewritten.
    """

    method: LoRA
    scale: float
    dropout: float

    later: ClassVar[frozenset[str]] = frozenset({"b"})

    a0: Any  # None where there is no such start, like the next
    b0: Any

    def __init__(self, site: Site, method: LoRA):
        super().__init__(site)
        self.method, self.scale, self.dropout = method, method.scale, method.dropout
        self.a_is_zero: bool = self.layout.embeds and not method.freeze_a
        self.a: nn.Parameter = trainable(
            *self.stack, method.rank, self.i, site=site, dtype=method.dtype
        )
        self.b: nn.Parameter = trainable(
            *self.stack, self.o, method.rank, site=site, dtype=method.dtype
        )
        self.fixed: bool = method.init in ("pissa", "olora", "lora_ga", "corda")
        for name, like in (("a0", self.a), ("b0", self.b)):
            self.register_buffer(name, torch.empty_like(like.data) if self.fixed else None)
        if method.freeze_a:
            a = self.a.data
            del self.a
            self.register_buffer("a", a)

    def reset(self, w: Tensor | None) -> None:
        a, b, init = self.a, self.b, self.method.init
        if init in ("pissa", "olora"):
            self.start(w, *self._split(self.matrices(w)))
            return
        # an embedding's rows are looked up, not multiplied: there the other factor starts at zero
        drawn, zero = (b, a) if self.a_is_zero else (a, b)
        zero.zero_()
        if self.a_is_zero:
            drawn.normal_()
        elif init == "gaussian":
            drawn.normal_(std=1 / self.method.rank)
        else:
            for matrix in drawn.flatten(0, -3) if drawn.dim() > 2 else [drawn]:
                if init == "orthogonal":
                    nn.init.orthogonal_(matrix)
                else:
                    nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        self.start(w, a, b)

    @torch.no_grad()
    def start(self, w: Tensor | None, a: Tensor, b: Tensor) -> None:
        """Begins at given factors A and B, which are B₀A₀ too where that is kept."""
        for tensor, value in ((self.a, a), (self.a0, a), (self.b, b), (self.b0, b)):
            if tensor is not None:
                tensor.copy_(value)

    def matrices(self, w: Tensor) -> Tensor:
        """A tensor shaped as W, as matrices (*stack, o, i) in fp32 at least."""
        return self.layout.matrices(w).to(wide(w))

    def _split(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of W itself: its first singular directions, or those of its QR."""
        r = self.method.rank
        if self.method.init == "pissa":
            u, s, v = torch.linalg.svd(w, full_matrices=False)
            root = s[..., :r].div(self.scale).sqrt()
            b, a = u[..., :r] * root[..., None, :], v[..., :r, :] * root[..., :, None]
        else:
            q, upper = torch.linalg.qr(w)
            b, a = q[..., :r], upper[..., :r, :]
        return a, b

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B; with a fixed start A₀, B₀ those of BA − B₀A₀ = (B−B₀)A + B₀(A−A₀)."""
        own: Any = self._parameters  # nn.Module's attribute access costs as much as a small matmul
        a, b = own["a"] if "a" in own else self.a, own["b"]
        if self.fixed:  # subtracted in their own dtype: no step is too small to be seen
            a, b = torch.cat([a, a - self.a0], -2), torch.cat([b - self.b0, self.b0], -1)
        return a, b


@dataclass(frozen=True)
class LoRA(RankMethod):
    """W' = W + s·BA, with A (r, i) and B (o, r). Hu et al., arXiv:2106.09685, §4.1.

    On linear maps (Linear, convolutions, embeddings) the product is never formed:
    y = Wx + s·B(Ax). Any other tensor of two dimensions or more is read as W'; more dimensions are
    a stack of matrices, each with its own factors. By default it takes every weight of a linear
    map but the output head's.

    Args:
        rank: r.
        alpha: the numerator of the scaling. Default: equal to `rank`.
        dropout: probability of dropping an input feature of A, in training.
        scaling: s = "alpha/r", or "rslora": alpha/√r (Kalajdzievski, arXiv:2312.03732).
        init: "kaiming": A uniform in ±1/√i, B zero; "gaussian": A normal with σ = 1/r;
            "orthogonal": A with orthonormal rows; "pissa": the first r singular directions of W
            (Meng et al., arXiv:2404.02948); "olora": its QR (Büyükakyüz, arXiv:2406.01775).
            "eva", "lora_ga", "corda" and "loftq" go by data, and begin as "kaiming" does until
            `pl.initialize` has seen them. Where A and B start from something else than nothing,
            their product is kept as a fixed part of the delta, ΔW = s·(BA − B₀A₀), in place of
            being taken out of the base.
        freeze_a: whether A stays as it began, and B alone learns: half the parameters, and no
            input is kept for the backward pass (LoRA-FA, Zhang et al., arXiv:2308.03303, §3).
    """

    dropout: float = number(0.0, float, lambda p: 0 <= p < 1, "in [0, 1)")
    scaling: Scaling = one_of("alpha/r", Scaling)
    init: Init = one_of("kaiming", Init)
    freeze_a: bool = False

    patch: ClassVar[type[LoRAPatch]] = LoRAPatch

    @property
    def scale(self) -> float:
        """s, the factor of the product."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank if self.scaling == "alpha/r" else math.sqrt(self.rank))

    def build(self, site: Site) -> Patch:
        self.check(site)
        needed = 0 if self.init in ("kaiming", "gaussian") else self.rank
        needed *= 2 if self.init == "lora_ga" else 1  # A's directions and B's are different ones
        if needed:
            self._check_directions(site, needed)
        if self.init in ("eva", "corda") and not maps.maps_vectors(site.module, site.slot):
            raise TargetError(
                f"init={self.init!r} goes by the inputs of linear maps, and {site.address} is no "
                "weight of one that is called: leave it out with exclude="
            )
        return type(self).patch(site, self)

    def _check_directions(self, site: Site, needed: int) -> None:
        """Raises TargetError if a site's matrices have too few directions to take."""
        layout = site.layout
        if needed > min(layout.o, layout.i):
            raise TargetError(
                f"{site.address} has matrices of {layout.rows}×{layout.columns}, whose rank is at "
                f"most {min(layout.o, layout.i)}: init={self.init!r} has no {needed} directions to "
                "take"
            )
