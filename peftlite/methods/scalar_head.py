"""ScalarHead: w·h + c, one number in place of the output head's many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.patch import trainable
from peftlite.core.site import Site
from peftlite.methods.calls import CallMethod, CallPatch
from peftlite.methods.features import Features


class ScalarHeadPatch(CallPatch):
    """y = w·h + c with `weight` (1, i) and `bias` (1), in their own dtype: bf16 is too coarse."""

    i: int
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, site: Site, method: ScalarHead, wide: Features):
        super().__init__(site, wide)
        self.i = wide.i or 0
        self.weight, self.bias = (
            trainable(*shape, site=site, dtype=method.dtype) for shape in ((1, self.i), (1,))
        )

    def reset(self, w: Tensor | None) -> None:
        self.weight.zero_()
        self.bias.zero_()

    def call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        h = next(iter((*args, *kwargs.values())))
        self.check(h, self.i)
        return F.linear(h.to(self.weight.dtype), self.weight, self.bias)


@dataclass(frozen=True)
class ScalarHead(CallMethod):
    """y = w·h + c in place of the output head's logits, w (1, i), c (1), both zero at first.

    A reward model is a language model with such a head: Ouyang et al., arXiv:2203.02155, §3.5; so
    is the value function of PPO. `[pl.LoRA(), pl.ScalarHead()]` is a delta that makes one of the
    base. It gives one number (…, 1) for each token, so its rows can't be mixed with others'. By
    default it takes the call of the output head.
    """

    rate: ClassVar[float] = 1.0
    takes = "calls of maps of features, such as an output head's"
    patch = ScalarHeadPatch

    def default(self, site: Site) -> bool:
        return site.head and self.accepts(site)

    def suits(self, wide: Features) -> bool:
        return wide.i is not None
