"""NormTuning: γ' = γ + dγ, β' = β + dβ for every normalisation layer, and nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from peftlite.core.patch import Method
from peftlite.core.site import Site
from peftlite.methods.full import AddPatch

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_NAMED = re.compile(r"Norm(?![a-z])")  # LlamaRMSNorm, T5LayerNorm; not a Normalizer


@dataclass(frozen=True)
class NormTuning(Method):
    """γ' = γ + dγ and β' = β + dβ: trains the scale and the shift of every normalisation layer.

    They are kept as differences (o) that start at zero. A normalisation layer is one of torch's, or
    a module with the word Norm in its class name and no parameters but of 1 dimension. Zhao et al.,
    "Tuning LayerNorm in Attention", arXiv:2312.11420, §3.
    """

    # * of three small models
    rate: ClassVar[float] = 4
    takes = "the scales and shifts of normalisation layers"

    def accepts(self, site: Site) -> bool:
        if site.is_call:
            return False
        module = site.module
        own = (p for p in module._parameters.values() if p is not None)
        named = _NAMED.search(type(module).__name__) and all(p.dim() == 1 for p in own)
        return isinstance(module, _NORMS) or bool(named)

    def build(self, site: Site) -> AddPatch:
        # a layer of the user's own may go by any name
        if site.is_call or not (self.accepts(site) or site.whole.dim() == 1):
            raise self.refuse(site)
        return AddPatch(site, self.dtype)
