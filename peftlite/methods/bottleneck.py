"""Bottleneck adapters: y + s·up(f(down(y))), a small network after a sublayer, or beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.errors import PeftliteError, TargetError
from peftlite.methods.features import Features, change_first, features, is_called
from peftlite.patch import Method, Patch, set_number, trainable
from peftlite.site import CALL, Site
from peftlite.table import shown

Preset = Literal["houlsby", "pfeiffer", "parallel"]
Activation = Literal["relu", "gelu", "silu", "tanh"]
Init = Literal["zero", "normal"]

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
_NORMS = (nn.LayerNorm, nn.RMSNorm)


class BottleneckPatch(Patch):
    """y + s·(U·f(D·z + d) + u) with `down` D (r, i) and `up` U (o, r); z is y, or the input."""

    def __init__(self, site: Site, method: BottleneckAdapter, wide: Features):
        super().__init__()
        self.method, self.address, self.dim = method, site.address, wide.dim
        self.act, self.scale = _ACTIVATIONS[method.function], method.factor
        self.beside = method.preset == "parallel"
        self.inside = method.preset == "pfeiffer" and isinstance(site.module, _NORMS)
        i, o = wide.i if self.beside else wide.o, wide.o
        r = method.bottleneck_size or max(1, int(o / method.reduction_factor))
        self.down, self.down_bias, self.up, self.up_bias = (
            trainable(*shape, site=site, dtype=method.dtype)
            for shape in ((r, i), (r,), (o, r), (o,))
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
        """y + s·(U·f(D·z + d) + u), along the dimension of the features."""
        own: Any = self._parameters  # nn.Module's attribute access costs as much as a small matmul
        factors = own["down"], own["down_bias"], own["up"], own["up_bias"]
        self._check(y, len(factors[3]))
        self._check(z, factors[0].shape[1])
        down, d, up, u = (p if p.dtype is z.dtype else p.to(z.dtype) for p in factors)
        if self.dim == -1:
            change = F.linear(self.act(F.linear(z, down, d)), up, u)
        else:
            hidden = self.act(F.linear(z.movedim(self.dim, -1), down, d))
            change = F.linear(hidden, up, u).movedim(-1, self.dim)
        return torch.add(y, change, alpha=self.scale)

    def _check(self, z: Any, width: int) -> None:
        """Raises PeftliteError if what is called with, or gives, isn't what it looked to be."""
        if not isinstance(z, Tensor) or z.shape[self.dim :][:1] != (width,):
            what = f"a tensor of shape {tuple(z.shape)}" if isinstance(z, Tensor) else shown(z)
            raise PeftliteError(
                f"{self.address} has {what} where its adapter works on {width} features in "
                f"dimension {self.dim}: say width=, or name a call inside it"
            )


@dataclass(frozen=True)
class Place:
    """What a preset stands for: the roles of the calls it takes, its activation and scale."""

    roles: str
    activation: Activation
    scale: float


PLACES = {
    "houlsby": Place("attention ffn ffn-last dense", "gelu", 1.0),
    "pfeiffer": Place("ffn ffn-last norm sum", "relu", 1.0),
    "parallel": Place("ffn", "relu", 4.0),
}

# what sublayers are called, in lower case and without underscores
_ATTENTION = re.compile(r"(self|cross|encoder|encdec|multihead)?(attn|attention)\d?")
_FFN = re.compile(r"mlp|ffn|ff|feedforward|densereludense|blocksparsemoe")


def role(site: Site) -> str:
    """What a call is in a transformer, going by names.

    BERT has its sublayers in pieces: `output` holds the last map, `dense`, and ends in the sum with
    the sublayer's input; so its piece in the attention, and there the norm comes after the sum.
    """
    module, path = site.module, site.address.removesuffix(CALL).replace("_", "").lower()
    *above, last = ("", "", *path.split("."))[-3:]
    in_attention = any(map(_ATTENTION.fullmatch, above))
    if above[-1] == "output" and last == "dense":
        return "attention" if in_attention else "dense"
    if in_attention or any(map(_FFN.fullmatch, above)):
        return ""
    if above[-1] == "output" and last == "layernorm":
        return "norm"
    if last == "output" and hasattr(module, "dense"):
        return "" if hasattr(module, "LayerNorm") else "sum"
    if last in ("fc2", "linear2"):
        return "ffn-last"
    if _ATTENTION.fullmatch(last) and not hasattr(module, "output"):
        return "attention"
    return "ffn" if _FFN.fullmatch(last) else ""


@dataclass(frozen=True)
class BottleneckAdapter(Method):
    """y + s·up(f(down(y))): two small linear maps with biases, at the output y of a sublayer.

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
    """

    preset: Preset = "houlsby"
    reduction_factor: float = 16.0
    bottleneck_size: int | None = None
    activation: Activation | None = None
    scale: float | None = None
    init: Init = "zero"
    width: int | None = None

    takes = "calls that are made and give features (nn.MultiheadAttention never calls its out_proj)"

    def __post_init__(self) -> None:
        super().__post_init__()
        set_number(self, "reduction_factor", float, _is_positive, "finite and above 0")
        for name in ("bottleneck_size", "width"):
            if getattr(self, name) is not None:
                set_number(self, name, int, lambda n: n >= 1, "a whole number from 1 up")
        if self.scale is not None:
            set_number(self, "scale", float, _is_positive, "finite and above 0")
        for name, kind in (("preset", Preset), ("activation", Activation), ("init", Init)):
            given = getattr(self, name)
            if given not in get_args(kind) and not (name == "activation" and given is None):
                raise PeftliteError(
                    f"{name} must be one of {', '.join(map(repr, get_args(kind)))}, not {given!r}"
                )

    @property
    def function(self) -> Activation:
        """The name of f."""
        return self.activation or PLACES[self.preset].activation

    @property
    def factor(self) -> float:
        """s."""
        return PLACES[self.preset].scale if self.scale is None else self.scale

    def default(self, site: Site) -> bool:
        made = site.is_call and is_called(site.module)
        return made and role(site) in PLACES[self.preset].roles.split()

    def accepts(self, site: Site) -> bool:
        return site.is_call and is_called(site.module) and self._features(site) is not None

    def build(self, site: Site) -> BottleneckPatch:
        if not site.is_call or not is_called(site.module):
            raise self.refuse(site)
        if (wide := self._features(site)) is None:
            raise TargetError(
                f"how wide what {site.address} takes and gives is can't be told from its layers: "
                f"say width=, or name a call inside it"
            )
        return BottleneckPatch(site, self, wide)

    def _features(self, site: Site) -> Features | None:
        """The widths at a call, or None if they can't be told or don't suit."""
        wide = features(site, self.width)
        return None if wide and wide.i is None and self.preset == "parallel" else wide


def _is_positive(number: float) -> bool:
    return 0 < number < math.inf
