"""LoRA: W' = W + s·BA, a trainable product of low rank beside every weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.errors import PeftliteError, TargetError
from peftlite.maps import Map, widen
from peftlite.patch import Patch, WeightMethod, set_number, trainable
from peftlite.site import Site

Scaling = Literal["alpha/r", "rslora"]
Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"]


class LoRAPatch(Patch):
    """ΔW = s·(BA − B₀A₀), with `a` (r, i) and `b` (o, r); stacks of matrices keep their stack.

    B₀A₀ is there for the inits that take factors from W (PiSSA, OLoRA): it is fixed, so that a
    fresh delta changes nothing and the base is never rewritten.
    """

    a0: Tensor | None
    b0: Tensor | None

    def __init__(self, site: Site, method: LoRA):
        super().__init__()
        stack, (rows, columns) = site.matrices
        i, o = (rows, columns) if site.transposed else (columns, rows)
        self.method, self.scale, self.transposed = method, method.scale, site.transposed
        self.embeds = site.transposed and isinstance(site.module, nn.Embedding | nn.EmbeddingBag)
        self.a = trainable(*stack, method.rank, i, site=site, dtype=method.dtype)
        self.b = trainable(*stack, o, method.rank, site=site, dtype=method.dtype)
        self.fixed, self.dropout = method.init in ("pissa", "olora"), method.dropout
        for name, like in (("a0", self.a), ("b0", self.b)):
            self.register_buffer(name, torch.empty_like(like.data) if self.fixed else None)

    def reset(self, w: Tensor | None) -> None:
        a, b, init = self.a, self.b, self.method.init
        if self.fixed:
            self._split(w.reshape(*a.shape[:-2], *self._matrix_shape()))
            return
        # an embedding's rows are looked up, not multiplied: there the other factor starts at zero
        drawn, zero = (b, a) if self.embeds else (a, b)
        zero.zero_()
        if self.embeds:
            drawn.normal_()
        elif init == "gaussian":
            drawn.normal_(std=1 / self.method.rank)
        else:
            for matrix in drawn.flatten(0, -3) if drawn.dim() > 2 else [drawn]:
                if init == "orthogonal":
                    nn.init.orthogonal_(matrix)
                else:
                    nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def _matrix_shape(self) -> tuple[int, int]:
        i, o = self.a.shape[-1], self.b.shape[-2]
        return (i, o) if self.transposed else (o, i)

    def _split(self, w: Tensor) -> None:
        """The factors of W itself: its first singular directions, or those of its QR."""
        r = self.method.rank
        w = (w.mT if self.transposed else w).to(torch.promote_types(self.a.dtype, torch.float32))
        if self.method.init == "pissa":
            u, s, v = torch.linalg.svd(w, full_matrices=False)
            root = s[..., :r].div(self.scale).sqrt()
            b, a = u[..., :r] * root[..., None, :], v[..., :r, :] * root[..., :, None]
        else:
            q, upper = torch.linalg.qr(w)
            b, a = q[..., :r], upper[..., :r, :]
        for tensor, value in ((self.a, a), (self.a0, a), (self.b, b), (self.b0, b)):
            tensor.copy_(value)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A and B; with a fixed start A₀, B₀ those of BA − B₀A₀ = (B−B₀)A + B₀(A−A₀)."""
        own: Any = self._parameters  # nn.Module's attribute access costs as much as a small matmul
        a, b = own["a"], own["b"]
        if self.fixed:  # subtracted in their own dtype: no step is too small to be seen
            a, b = torch.cat([a, a - self.a0], -2), torch.cat([b - self.b0, self.b0], -1)
        return a, b

    def value(self, w: Tensor) -> Tensor:
        a, b = self._factors()
        # in fp32 at least, so that W' is rounded once
        wide = torch.promote_types(torch.promote_types(w.dtype, a.dtype), torch.float32)
        a, b = a.to(wide), b.to(wide)
        if self.training and self.dropout:
            # a dropped input feature is a dropped column of A; rows of a batch share the mask
            a = a * F.dropout(torch.ones_like(a[..., :1, :]), self.dropout)
        change = a.mT @ b.mT if self.transposed else b @ a
        return torch.add(w, change.reshape(w.shape), alpha=self.scale).to(w.dtype)

    def call(self, inner: Map, input: Tensor, *args: object, **kwargs: object) -> Tensor:
        x = input
        if self.training and self.dropout and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        w, (a, b) = inner.weight, self._factors()
        if a.dtype is not w.dtype:
            a, b = a.to(w.dtype), b.to(w.dtype)
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        if self.index is not None:
            left, right = widen(left, right, self.index, w.shape)
        return inner.add_low_rank(left, right, self.scale, x, input, *args, **kwargs)


@dataclass(frozen=True)
class LoRA(WeightMethod):
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
            The last two start from W's own factors, whose product is kept as a fixed part of the
            delta, ΔW = s·(BA − B₀A₀), in place of being taken out of the base.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    scaling: Scaling = "alpha/r"
    init: Init = "kaiming"

    patch: ClassVar[type[LoRAPatch]] = LoRAPatch

    def __post_init__(self) -> None:
        super().__post_init__()
        set_number(self, "rank", int, lambda rank: rank >= 1, "a whole number from 1 up")
        set_number(self, "dropout", float, lambda p: 0 <= p < 1, "in [0, 1)")
        if self.alpha is not None:
            set_number(self, "alpha", float, lambda a: 0 < a < math.inf, "finite and above 0")
        for name, kind in (("scaling", Scaling), ("init", Init)):
            if getattr(self, name) not in get_args(kind):
                raise PeftliteError(
                    f"{name} must be one of {', '.join(map(repr, get_args(kind)))}, "
                    f"not {getattr(self, name)!r}"
                )

    @property
    def scale(self) -> float:
        """s, the factor of the product."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank if self.scaling == "alpha/r" else math.sqrt(self.rank))

    def build(self, site: Site) -> LoRAPatch:
        if not self.accepts(site):
            raise self.refuse(site)
        _, matrix = site.matrices
        if self.rank > min(matrix) and self.init in ("pissa", "olora", "orthogonal"):
            raise TargetError(
                f"{site.address} has matrices of {matrix[0]}×{matrix[1]}, whose rank is at most "
                f"{min(matrix)}: init={self.init!r} has no {self.rank} directions to take"
            )
        return self.patch(site, self)
