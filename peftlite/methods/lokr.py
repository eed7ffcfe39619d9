"""LoKr: W' = W + s·w1 ⊗ w2, a Kronecker product of two small matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlite.core.layout import Layout
from peftlite.core.maps import Map
from peftlite.core.patch import Patch, trainable
from peftlite.core.site import Site
from peftlite.core.tensors import wide
from peftlite.fields import set_number
from peftlite.methods.low_rank import RankMethod


class LoKrPatch(Patch):
    """`w1` (o₁, i₁) and `w2` (o₂, i₂·k), or each as a product `w1a w1b`, `w2a w2b` of rank r.

    o and i are the first two dimensions of the weight as it is stored, whatever they mean (the
    transpose of a Kronecker product is one too), and k the taps of a convolution's kernel.
    """

    scale: float
    layout: Layout

    def __init__(self, site: Site, method: LoKr):
        super().__init__()
        self.scale, self.layout = method.scale, site.layout
        taps = self.layout.taps
        (o1, o2), (i1, i2) = method.sizes(site)
        for name, rows, columns, low in (
            ("w1", o1, i1, method.decompose_both and 2 * method.rank < max(o1, i1)),
            ("w2", o2, i2 * taps, 2 * method.rank < max(o2, i2)),
        ):
            shapes = {name + "a": (rows, method.rank), name + "b": (method.rank, columns)}
            for key, shape in (shapes if low else {name: (rows, columns)}).items():
                factor = trainable(*self.layout.stack, *shape, site=site, dtype=method.dtype)
                self.register_parameter(key, factor)
        if not site.rides:
            self.has_call = False

    def reset(self, w: Tensor | None) -> None:
        *drawn, last = self.parameters()  # the last is w2, or its w2b
        for factor in drawn:
            bound = 1 / math.sqrt(factor.shape[-1])
            factor.uniform_(-bound, bound)
        last.zero_()

    def _factor(self, name: str, dtype: torch.dtype) -> Tensor:
        own: Any = self._parameters
        if name in own:
            return own[name].to(dtype)
        return own[name + "a"].to(dtype) @ own[name + "b"].to(dtype)

    def value(self, w: Tensor) -> Tensor:
        dtype = wide(w, next(self.parameters()))
        w1, w2 = self._factor("w1", dtype), self._factor("w2", dtype)
        change = w1[..., :, None, :, None] * w2[..., None, :, None, :]
        return torch.add(w, change.reshape(w.shape), alpha=self.scale).to(w.dtype)

    def call(self, inner: Map, input: Tensor) -> Tensor:
        dtype = inner.weight.dtype
        w1, w2 = self._factor("w1", dtype), self._factor("w2", dtype)
        if self.layout.transposed:
            w1, w2 = w1.mT, w2.mT
        # (w1 ⊗ w2) x: one factor on each dimension of the input as (i₁, i₂)
        h = F.linear(input.unflatten(-1, (w1.shape[1], w2.shape[1])), w2)
        # not w1 @ h, whose last bits go by whether w1 trains
        change = F.linear(h.mT.contiguous(), w1).mT
        return torch.add(inner(input), change.flatten(-2), alpha=self.scale)


def split(n: int, most: int | None) -> tuple[int, int]:
    """n as a product u·v, with u the largest up to √n and `most`."""
    highest = math.isqrt(n) if most is None else min(math.isqrt(n), most)
    u = next(u for u in range(highest, 0, -1) if n % u == 0)
    return u, n // u


def _check_factor(method: Any, name: str) -> None:
    """Makes a factor one plain number or two. Raises PeftliteError."""
    given = getattr(method, name)
    if isinstance(given, list | tuple) and len(given) == 2:
        if all(type(n) is int and n > 0 for n in given):
            object.__setattr__(method, name, tuple(given))
            return
    what = "a whole number from 1 up, or two of them, the rows and columns of w1"
    set_number(method, name, int, lambda n: n >= 1, what)


@dataclass(frozen=True)
class LoKr(RankMethod):
    """W' = W + s·w1 ⊗ w2, w2 = w2a w2b. Yeh et al. (LyCORIS), arXiv:2309.14859.

    Each dimension n of W (o, i) is split as u·v with u ≤ v; w1 has the smaller parts, w2 the
    larger, and ΔW the product of their ranks. w2 is of rank r where r is below half its larger
    dimension, and full otherwise; a convolution's taps belong to w2. s = alpha/r, even where both
    are full. As in the authors' code w2 starts at zero, where peft has w1 do so, and u ≤ v holds
    for any `factor`. By default it takes every weight of a linear map but the output head's.

    Args:
        rank: r.
        alpha: the numerator of the scaling. Default: equal to `rank`.
        factor: the most that u may be; or both u themselves, as the rows and columns of w1, which
            may then be above v. Default: the u nearest to √n.
        decompose_both: whether w1 is of rank r too, by the same rule.
    """

    factor: int | tuple[int, int] | None = field(default=None, metadata={"check": _check_factor})
    decompose_both: bool = False

    # 3e-3 for Llama-3.2-3B (×8): peft, method_comparison/MetaMathQA
    rate: ClassVar[float] = 8
    takes: ClassVar[str] = "tensors of 2 or more dimensions, that a factor of two numbers divides"
    patch: ClassVar[type[LoKrPatch]] = LoKrPatch

    def accepts(self, site: Site) -> bool:
        return super().accepts(site) and all(u * v for u, v in self.sizes(site))

    def sizes(self, site: Site) -> list[tuple[int, int]]:
        """(o₁, o₂) and (i₁, i₂); 0 for what two given numbers don't divide."""
        rows, columns = site.layout.rows, site.layout.columns // site.layout.taps
        if isinstance(self.factor, tuple):
            own = zip((rows, columns), self.factor, strict=True)
            return [(u, 0 if n % u else n // u) for n, u in own]
        return [split(n, self.factor) for n in (rows, columns)]
