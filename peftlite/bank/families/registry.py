"""Families: which patches can be mixed by rows, and what mixes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peftlite.bank.families.bottleneck import MixedBeside, MixedBottleneck, MixedInside
from peftlite.bank.families.conv import MixedConv, MixedConvTranspose
from peftlite.bank.families.linear import MixedDense
from peftlite.bank.families.loreft import MixedLoReFT
from peftlite.bank.families.low_rank import MixedDoRA, MixedEmbedding, MixedLowRank
from peftlite.bank.families.mixed import Mixed
from peftlite.bank.families.prefix import MixedPrefix
from peftlite.bank.families.prompt import MixedAround, MixedLayers, MixedPrompt, MixedStack
from peftlite.bank.families.reading import ReadDense, ReadLowRank, is_read
from peftlite.bank.families.sparse import MixedSparse
from peftlite.bank.families.vectors import MixedInputs, MixedOutputs, MixedVector
from peftlite.core import maps
from peftlite.core.patch import Patch
from peftlite.core.site import Site
from peftlite.errors import PeftliteError
from peftlite.methods.bitfit import AddedBiasPatch
from peftlite.methods.bottleneck import BottleneckPatch
from peftlite.methods.compacter import CompacterPatch
from peftlite.methods.dora import DoRAPatch
from peftlite.methods.ia3 import ScalePatch
from peftlite.methods.loreft import LoReFTPatch
from peftlite.methods.low_rank import LowRankPatch
from peftlite.methods.prefix import PrefixPatch
from peftlite.methods.prompt import PromptPatch
from peftlite.methods.ptuning import EncodedPromptPatch
from peftlite.methods.search import SearchPatch
from peftlite.methods.sparse import SparsePatch
from peftlite.methods.virtual import AroundPatch, LayersPatch, StackPatch

Family = type[Mixed] | Callable[[Any, Site], type[Mixed]]


def _of_adapter(patch: Any, _: Site) -> type[MixedBottleneck]:
    """What mixes an adapter, by its place."""
    return MixedInside if patch.inside else MixedBeside if patch.beside else MixedBottleneck


AT_CALLS: dict[type[Patch], Family] = {
    AddedBiasPatch: MixedVector,
    BottleneckPatch: _of_adapter,
    CompacterPatch: _of_adapter,
    LoReFTPatch: MixedLoReFT,
    PrefixPatch: MixedPrefix,
    StackPatch: MixedStack,
    AroundPatch: MixedAround,
    LayersPatch: MixedLayers,
    PromptPatch: MixedPrompt,
    EncodedPromptPatch: MixedPrompt,
}
LOW_RANK: dict[type[maps.Map] | None, type[Mixed]] = {
    maps.Embedding: MixedEmbedding,
    maps.Conv: MixedConv,
    maps.ConvTranspose: MixedConvTranspose,
}
AT_MATRICES: dict[type[Patch], Family] = {
    DoRAPatch: MixedDoRA,
    LowRankPatch: lambda _, site: LOW_RANK.get(maps.kind_of(site.module), MixedLowRank),
    ScalePatch: lambda patch, _: MixedInputs if patch.inputs else MixedOutputs,
    SearchPatch: MixedSparse,
    SparsePatch: MixedSparse,
}


def family_of(patch: Patch, site: Site) -> type[Mixed]:
    """What mixes a patch of this class at such a site. Raises PeftliteError if nothing does."""
    family = _at_call(type(patch)) if site.is_call else _at_tensor(type(patch), site)
    return family if isinstance(family, type) else family(patch, site)


def _at_call(kind: type[Patch]) -> Family:
    if kind not in AT_CALLS:
        raise PeftliteError(
            f"a {kind.__name__} can't be mixed by rows; at calls there are "
            f"{', '.join(known.__name__ for known in AT_CALLS)}. For others, "
            "pl.using(model, rows=[...]) runs each group of rows by itself"
        )
    return AT_CALLS[kind]


def _at_tensor(kind: type[Patch], site: Site) -> Family:
    if is_read(site):
        return ReadLowRank if _is_as(kind, LowRankPatch) else ReadDense
    if site.whole.dim() == 1:
        return MixedVector
    known = (family for base, family in AT_MATRICES.items() if _is_as(kind, base))
    return next(known, MixedDense)


def _is_as(kind: type[Patch], base: type[Patch]) -> bool:
    """Whether it does what a class does, with no value or call of its own."""
    return issubclass(kind, base) and kind.value is base.value and kind.call is base.call
