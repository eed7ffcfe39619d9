"""Card: a method, and every question that the library has for it; and the sites that rows take."""

from __future__ import annotations

from dataclasses import dataclass, field

import peftlite as pl
from peftlite.methods.features import of_layer

FIXED = "the same for every width"
FUSED = ["qkv.weight[q]", "qkv.weight[v]"]


@dataclass(frozen=True, eq=False)
class Row:
    """A method in the contract: how it is attached, and where it can't be."""

    name: str
    method: pl.Method | list[pl.Method]
    refused: dict[str, str] = field(default_factory=dict)  # kind: what the TargetError says
    only: tuple[str, ...] = ()  # the kinds it is for, where it names sites that others lack
    fresh: bool = True  # whether a fresh delta changes nothing, as far as the definition allows it
    shaped: bool = True  # whether its outputs have the base's shape, so that rows can be mixed
    way: str = ""  # of WAYS, where it isn't its card's


@dataclass(frozen=True, eq=False)
class Card:
    """A method, and every question that the library has for it."""

    method: type[pl.Method]
    way: str  # of WAYS
    rows: tuple[Row, ...]  # the contract's; the first is the method as most have it
    golden: pl.Method  # whose file each release keeps
    bank: str  # the families of peftlite.bank that mix it, by their files, or "none: why"
    peft: str  # the name of its form in peft, or "none: why"
    rate: float | str  # of lr="auto": times LoRA's, FIXED, or "as LoRA's: why"
    as_peft: pl.Method | None = None  # on GPT-2, where peft has another than the golden one
    variants: str = ""  # what README's table has in brackets

    @property
    def name(self) -> str:
        return self.method.__name__


def anywhere(site: pl.Site) -> bool:
    return True


def called(site: pl.Site) -> bool:
    """Whether a call is made, and what it gives is read."""
    return site.address not in ("bert()", "shared()")


def layers(site: pl.Site) -> bool:
    return called(site) and of_layer(site.module) is not None


# where a tensor is stored otherwise, of more dimensions, or tied
UNUSUAL = ("experts", "conv_transpose", "embedding", "raw", "conv1d_hf", "lstm", "gpt_tied")
