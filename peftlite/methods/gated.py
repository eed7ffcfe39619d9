"""Gated: plain + g·(patched − plain), a method's change behind a gate that learns its share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftlite.core.patch import Method, Patch, trainable
from peftlite.core.site import Site
from peftlite.core.tensors import wide
from peftlite.errors import PeftliteError
from peftlite.fields import one_of
from peftlite.methods.calls import CallPatch
from peftlite.methods.features import Features, change_first, features
from peftlite.methods.keywords import cache_in
from peftlite.methods.past import PastPatch
from peftlite.table import short

Per = Literal["sequence", "token"]


class GatedPatch(CallPatch):
    """Another patch behind a gate σ(G·x + c): `weight` G (1, i), where there's an x, and `bias` c.

    A tensor is read as W + σ(c)·(V(W) − W), which can be merged.
    """

    has_value: bool
    has_call: bool

    patch: Any
    weight: nn.Parameter | None

    def __init__(self, site: Site, method: Gated, patch: Patch):
        widths = features(site) if site.is_call else None
        super().__init__(site, widths or Features(None, 0))
        self.patch, self.per, i = patch, method.per, widths and widths.i
        weight = trainable(1, i, site=site, dtype=method.dtype) if i else None
        self.register_parameter("weight", weight)
        self.bias: nn.Parameter = trainable(1, site=site, dtype=method.dtype)
        self.has_value, self.has_call = patch.has_value, site.is_call

    def reset(self, w: Tensor | None) -> None:
        self.bias.zero_()
        if self.weight is not None:
            self.weight.normal_(std=0.02)

    def value(self, w: Tensor) -> Tensor:
        widened = w.to(wide(w, self.bias))  # so that the patch doesn't round
        change = self.patch.value(widened) - widened
        return (widened + torch.sigmoid(self.bias.to(widened.dtype)) * change).to(w.dtype)

    def call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        made: list[Any] = []

        def make(*its: Any, **named: Any) -> Any:
            made.append(inner(*its, **named))
            return made[-1]

        begins_with_it = isinstance(self.patch, CallPatch)
        if not begins_with_it:
            self._check_uncached({**{str(i): x for i, x in enumerate(args)}, **kwargs})
            make(*args, **kwargs)
        y, *_ = pytree.tree_leaves(self.patch.call(make, *args, **kwargs))
        x = next(iter((*args, *kwargs.values())), None)
        return change_first(made[0], lambda plain: plain + self._gate(x, plain.dim()) * (y - plain))

    def _check_uncached(self, given: Mapping[str, Any]) -> None:
        if cache_in(given):
            raise PeftliteError(
                f"{self.address} is called with a cache, which would be filled twice, with and "
                f"without the {type(self.patch).__name__} behind its gate: pass use_cache=False"
            )

    def _gate(self, x: Any, dims: int) -> Tensor:
        """g, to be multiplied with an output of so many dimensions."""
        if self.weight is None:
            return torch.sigmoid(self.bias)
        self.check(x, self.weight.shape[1])
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        g = torch.sigmoid(self.along(lambda z: F.linear(z, weight, bias), x))
        if self.per == "token" or g.dim() < 2:
            return g
        return g.flatten(1).mean(1).reshape(-1, *(1 for _ in range(dims - 1)))

    def saved(self) -> dict[str, Tensor]:
        own: dict[str, Tensor] = {name: p for name, p in self._parameters.items() if p is not None}
        return own | {f"patch.{name}": tensor for name, tensor in self.patch.saved().items()}

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        start = "patch."
        inside = {k.removeprefix(start): s for k, s in shapes.items() if k.startswith(start)}
        self.patch.resize(inside)

    def regularizer(self) -> Tensor | None:
        return self.patch.regularizer()


@dataclass(frozen=True)
class Gated(Method):
    """y + g·(p − y), where y is what stands there, p what a method makes of it, and g = σ(Gx + c).

    The gates of UniPELT (Mao et al., arXiv:2110.07577, §3.2), each for a site of its own: write
    `[pl.Gated(pl.BottleneckAdapter()), pl.Gated(pl.LoRA(rank=8))]`. At a call, x is what it is
    given, and G (1, i); at an embedding or a convolution g is a number that is learned. At a tensor
    g is such a number too, W + g·(W' − W), so that it can be merged; the paper's depends on x.
    Where a method changes how a call is made, as a prefix does, it is made with and without, so no
    cache can be filled in it.

    Args:
        method: what is gated. Its targets, exclude and dtype hold here, where none are given.
        per: "sequence": the paper's, σ(Gx + c) averaged over all but the first dimension, the
            batch; "token": one g at each place, for models that may not look ahead.

    Raises:
        PeftliteError: what is gated is no method.
    """

    method: Method
    per: Per = one_of("sequence", Per)

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise PeftliteError(f"Gated takes a method such as LoRA(), not {short(self.method)}")
        for name in ("targets", "exclude", "dtype"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self.method, name))
        object.__setattr__(self, "takes", self.method.takes)
        super().__post_init__()

    def default(self, site: Site) -> bool:
        return self.method.default(site)

    def accepts(self, site: Site) -> bool:
        return self.method.accepts(site)

    def choose(self, picked: Sequence[Site], everything: Sequence[Site]) -> Sequence[Site]:
        return self.method.choose(picked, everything)

    def build_all(self, sites: Sequence[Site]) -> list[Patch]:
        patches = self.method.build_all(sites)
        if any(isinstance(patch, PastPatch) for patch in patches):
            raise PeftliteError(
                "a gate makes a call with what it gates and without, and a prefix with "
                "positions='shifted' is in the cache of both: gate one with positions='kept'"
            )
        return [GatedPatch(site, self, patch) for site, patch in zip(sites, patches, strict=True)]

    def reset_all(self, patches: Sequence[Any], tensors: Sequence[Tensor | None]) -> None:
        self.method.reset_all([gated.patch for gated in patches], tensors)
        super().reset_all(patches, tensors)

    def step(self, patches: Sequence[Any]) -> None:
        self.method.step([gated.patch for gated in patches])
