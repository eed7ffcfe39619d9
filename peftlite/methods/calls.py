"""Calls: what the methods share that change the features a sublayer or a block gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from peftlite.core.patch import Method, Patch
from peftlite.core.site import CALL, Site
from peftlite.errors import PeftliteError, TargetError
from peftlite.fields import integer
from peftlite.methods.features import Features, features, is_called
from peftlite.table import short


class CallPatch(Patch):
    """A change of the features that a call gives."""

    address: str
    dim: int
    o: int

    def __init__(self, site: Site, wide: Features):
        super().__init__()
        self.address, self.dim, self.o = site.address, wide.dim, wide.o

    def along(self, change: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """What a `change` of (b, …, i) makes of z, whose features may lie along another `dim`."""
        if self.dim == -1:
            return change(z)
        return change(z.movedim(self.dim, -1)).movedim(-1, self.dim)

    def check(self, z: Any, width: int) -> None:
        """Raises PeftliteError if what is called with, or gives, isn't what it looked to be."""
        if not isinstance(z, Tensor) or z.shape[self.dim :][:1] != (width,):
            what = f"a tensor of shape {tuple(z.shape)}" if isinstance(z, Tensor) else short(z)
            raise PeftliteError(
                f"{self.address} has {what} where its adapter works on {width} features in "
                f"dimension {self.dim}: say width=, or name a call inside it"
            )


@dataclass(frozen=True, kw_only=True)
class CallMethod(Method, abstract=True):
    """A method of calls that give features.

    Args:
        width: how many features they give, where it can't be told from a module's layers.
    """

    width: int | None = integer(None)

    patch: ClassVar[type[Any]]
    takes = "calls that are made and give features (nn.MultiheadAttention never calls its out_proj)"

    def accepts(self, site: Site) -> bool:
        wide = self.features(site) if is_made(site) else None
        return wide is not None and self.suits(wide)

    def build(self, site: Site) -> Patch:
        wide = self.features(site) if is_made(site) else None
        if is_made(site) and wide is None:
            raise TargetError(
                f"how wide what {site.address} takes and gives is can't be told from its layers: "
                f"say width=, or name a call inside it"
            )
        if wide is None or not self.suits(wide):
            raise self.refuse(site)
        return type(self).patch(site, self, wide)

    def features(self, site: Site) -> Features | None:
        """The widths at a call, or None if they can't be told."""
        return features(site, self.width)

    def suits(self, wide: Features) -> bool:
        """Whether the method works at such widths."""
        return True


def is_made(site: Site) -> bool:
    """Whether a site is a call, and one that is ever made."""
    return site.is_call and is_called(site.module)


# what the parts of a transformer are called, in lower case and without underscores
_ATTENTION = re.compile(r"(self|cross|encoder|encdec|multihead)?(attn|attention)\d?")
_FFN = re.compile(r"mlp|ffn|ff|feedforward|densereludense|blocksparsemoe")
_BLOCK = re.compile(r"(.*\.)?([a-z]*(layers?|blocks?)|h)\.\d+")


def role(site: Site) -> str:
    """What a call is in a transformer, going by names.

    BERT has its sublayers in pieces: `output` holds the last map, `dense`, and ends in the sum with
    the sublayer's input; so its piece in the attention, and there the norm comes after the sum.
    """
    module, path = site.module, _path(site)
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


def is_block(site: Site) -> bool:
    """Whether a call is a whole block's, as of `layers.0`, going by names; none is in another."""
    path = _path(site)
    inside = any(_BLOCK.fullmatch(path[: end.start()]) for end in re.finditer(r"\.", path))
    return bool(_BLOCK.fullmatch(path)) and not inside


def _path(site: Site) -> str:
    return site.address.removesuffix(CALL).replace("_", "").lower()
