"""Bottleneck adapters: y + s·up(f(down(y))), a small network after a sublayer, or beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.patch import trainable
from peftlite.core.site import Site
from peftlite.fields import check_given, integer, one_of, positive
from peftlite.methods.calls import CallMethod, CallPatch, is_made, role
from peftlite.methods.features import Features, change_first

Activation = Literal["relu", "gelu", "silu", "tanh"]

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
_NORMS = (nn.LayerNorm, nn.RMSNorm)


class BottleneckPatch(CallPatch):
    """y + s·(U·f(D·z + d) + u) with `down` D (r, i) and `up` U (o, r); z is y, or the input."""

    method: BottleneckAdapter
    scale: float
    down: nn.Parameter
    down_bias: nn.Parameter
    up: nn.Parameter
    up_bias: nn.Parameter

    def __init__(self, site: Site, method: BottleneckAdapter, wide: Features):
        super().__init__(site, wide)
        self.method, self.act, self.scale = method, ACTIVATIONS[method.function], method.factor
        self.beside: bool = method.preset == "parallel"
        self.inside: bool = method.preset == "pfeiffer" and isinstance(site.module, _NORMS)
        self.i: Any = wide.i if self.beside else wide.o
        self.shape(method.size(wide.o), site)

    def shape(self, r: int, site: Site) -> None:
        """Makes the parameters, not yet filled."""
        self.down, self.down_bias, self.up, self.up_bias = (
            trainable(*shape, site=site, dtype=self.method.dtype)
            for shape in ((r, self.i), (r,), (self.o, r), (self.o,))
        )

    def reset(self, w: Tensor | None) -> None:
        self.down_bias.zero_()
        self.up_bias.zero_()
        if self.method.init == "zero":
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
            self.up.zero_()
        else:
            for matrix in (self.down, self.up):
                nn.init.trunc_normal_(matrix, std=0.01, a=-0.02, b=0.02)

    def call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x = next(iter((*args, *kwargs.values())), None)
        if self.inside:
            return inner(self._add(x, inner(x)))
        output = inner(*args, **kwargs)
        return change_first(output, lambda y: self._add(y, x if self.beside else y))

    def _add(self, y: Any, z: Any) -> Tensor:
        self.check(y, self.o)
        self.check(z, self.i)
        return torch.add(y, self.along(self.change, z), alpha=self.scale)

    def change(self, z: Tensor) -> Tensor:
        """U·f(D·z + d) + u, over the last dimension."""
        own: Any = self._parameters  # nn.Module's attribute access costs as much as a small matmul
        factors = own["down"], own["down_bias"], own["up"], own["up_bias"]
        down, d, up, u = (p if p.dtype is z.dtype else p.to(z.dtype) for p in factors)
        return F.linear(self.act(F.linear(z, down, d)), up, u)


class Place(NamedTuple):
    """What a preset stands for: the roles of the calls it takes, its activation and scale."""

    roles: str
    activation: str
    scale: float


@dataclass(frozen=True)
class BottleneckAdapter(CallMethod):
    """y + s·up(f(down(y))): two small linear maps with biases, at the output y of a sublayer.

    `down` is (r, o) and `up` (o, r), of an output of o features; in parallel `down` is (r, i).

    Presets, at the calls they take by default:

    - "houlsby" (Houlsby et al., arXiv:1902.00751, §2.1): after attention and feed-forward, before
      the sum with the residual stream. There the norms are trained too: add `NormTuning`.
    - "pfeiffer" (Pfeiffer et al., arXiv:2005.00247): after the feed-forward alone. At a
      LayerNorm's call, as after BERT's, it is the paper's LN(z + up(f(down(LN(z))))).
    - "parallel" (He et al., arXiv:2110.04366): y + s·up(f(down(x))) with x the input of the
      feed-forward, or of whatever call is named. BERT makes no such call, so has no default.

    Attention is found by names such as attn, self_attn, attention or cross_attn; feed-forward by
    mlp, ffn, feed_forward or DenseReluDense, by its last map fc2 or linear2 where it's no module of
    its own, and by output.dense in BERT. Any call that returns a tensor of features, or a tuple or
    the like that begins with one, can be named: `targets="*.mixer()"`.

    Args:
        preset: see above.
        reduction_factor: of the width o, so that the bottleneck is max(1, ⌊o / reduction_factor⌋).
        bottleneck_size: r, in place of a reduction.
        activation: f, "relu", "gelu", "silu" or "tanh". Default: gelu for houlsby, relu otherwise.
        scale: s. Default: 4 for parallel, 1 otherwise.
        init: "zero": `up` is zero, so that nothing changes at first, and `down` is uniform in
            ±1/√i; "normal": both normal with σ = 0.01, cut off at 2σ, as in Houlsby: nearly nothing
            changes at first.
        width: o, where it can't be told from a module's layers.

    Raises:
        PeftliteError: a setting is none of those allowed.
    """

    preset: str = "houlsby"
    reduction_factor: float = positive(16.0)
    bottleneck_size: int | None = integer(None)
    activation: Activation | None = one_of(None, Activation)
    scale: float | None = positive(None)
    init: str = "zero"

    # * 3e-4 for RoBERTa-large, as LoRA (×0.4): microsoft/LoRA, examples/NLU
    rate: ClassVar[float] = 2
    patch: ClassVar[type[BottleneckPatch]] = BottleneckPatch
    inits: ClassVar[tuple[str, ...]] = ("zero", "normal")
    places: ClassVar[Mapping[str, Place]] = {
        "houlsby": Place("attention ffn ffn-last dense", "gelu", 1.0),
        "pfeiffer": Place("ffn ffn-last norm sum", "relu", 1.0),
        "parallel": Place("ffn", "relu", 4.0),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_given("preset", self.preset, tuple(self.places))
        check_given("init", self.init, self.inits)

    @property
    def function(self) -> str:
        """The name of f."""
        return self.activation or self.places[self.preset].activation

    @property
    def factor(self) -> float:
        """s."""
        return self.places[self.preset].scale if self.scale is None else self.scale

    def size(self, o: int) -> int:
        """r."""
        return self.bottleneck_size or max(1, int(o / self.reduction_factor))

    def default(self, site: Site) -> bool:
        return is_made(site) and role(site) in self.places[self.preset].roles.split()

    def features(self, site: Site) -> Features | None:
        wide = super().features(site)
        return None if wide and wide.i is None and self.preset == "parallel" else wide
