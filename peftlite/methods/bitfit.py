"""BitFit: b' = b + d for every bias, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from peftlite.methods.full import AddPatch
from peftlite.patch import Method
from peftlite.site import Site


@dataclass(frozen=True)
class BitFit(Method):
    """b' = b + d: trains the biases, here as differences that start at zero.

    By default it takes every bias of the model. Ben Zaken et al., "BitFit", arXiv:2106.10199.
    """

    takes = "biases, which have 1 dimension"

    def accepts(self, site: Site) -> bool:
        # torch's own spellings: bias, bias_ih_l0, in_proj_bias; bias_k of attention is a token
        name = site.slot
        biased = name == "bias" or name.endswith("_bias") or name.startswith(("bias_ih", "bias_hh"))
        return biased and site.whole.dim() == 1

    def build(self, site: Site) -> AddPatch:
        if site.is_call or site.whole.dim() != 1:
            raise self.refuse(site)
        return AddPatch(site, self.dtype)
