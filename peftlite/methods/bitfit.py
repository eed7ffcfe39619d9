"""BitFit: b' = b + d for every bias, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlite.core.maps import is_weight
from peftlite.core.patch import Method, Patch, trainable
from peftlite.core.site import Site
from peftlite.methods.features import Features, is_called, of_layer
from peftlite.methods.full import AddPatch


class AddedBiasPatch(Patch):
    """y' = y + d, with `d` (o): the bias that a layer was made without, along its features."""

    def __init__(self, site: Site, wide: Features, dtype: torch.dtype | None):
        super().__init__()
        self.after: int = -1 - wide.dim  # the dimensions behind that of the features
        self.d: nn.Parameter = trainable(wide.o, site=site, dtype=dtype)

    def reset(self, w: Tensor | None) -> None:
        self.d.zero_()

    def call(self, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        y = inner(*args, **kwargs)
        return (y + self.d.reshape(-1, *(1 for _ in range(self.after)))).to(y.dtype)


@dataclass(frozen=True)
class BitFit(Method):
    """b' = b + d: trains the biases, here as differences d (o) that start at zero.

    By default it takes every bias of the model. Ben Zaken et al., "BitFit", arXiv:2106.10199, §3.

    Args:
        add_missing: whether to give a bias to the linear maps, but for the output head, that were
            made with `bias=False`; that changes their calls, as nothing is there to merge it into.
    """

    add_missing: bool = False

    # * 1e-3 for BERT-base (×1): benzakenelad/BitFit, README.md
    rate: ClassVar[float] = 3
    takes = "biases, which have 1 dimension"

    def default(self, site: Site) -> bool:
        return self.accepts(site) and not (site.is_call and site.head)

    def accepts(self, site: Site) -> bool:
        if site.is_call:
            return self.add_missing and _lacks_bias(site.module)
        # torch's own spellings: bias, bias_ih_l0, in_proj_bias; bias_k of attention is a token
        name = site.slot
        biased = name == "bias" or name.endswith("_bias") or name.startswith(("bias_ih", "bias_hh"))
        return biased and site.whole.dim() == 1

    def build(self, site: Site) -> Patch:
        if site.is_call and self.accepts(site):
            return AddedBiasPatch(site, of_layer(site.module), self.dtype)
        if site.is_call or site.whole.dim() != 1:
            raise self.refuse(site)
        return AddPatch(site, self.dtype)


def _lacks_bias(module: nn.Module) -> bool:
    empty = "bias" in module._parameters and module._parameters["bias"] is None
    return empty and is_weight(module, "weight") and is_called(module)
