"""Reading: W' = W + D_k where a module reads W by itself, in a pass that has one delta alone.

    y = x W[e]ᵀ + s_k·(x A_k[e]ᵀ) B_k[e]ᵀ     where the factors do for all that is made of W

Such passes are the work of `bank/split.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftlite.bank.families.linear import Dense
from peftlite.bank.families.low_rank import MixedLowRank
from peftlite.bank.families.mixed import Mixed
from peftlite.bank.rows import ByToken, Rows, Tables
from peftlite.core import maps
from peftlite.core.site import Site
from peftlite.core.tensors import wide
from peftlite.core.tokens import Lost
from peftlite.errors import PeftliteError
from peftlite.methods.low_rank import dropped

_READ_ONLY = nn.modules.linear.NonDynamicallyQuantizableLinear
_READERS = (nn.MultiheadAttention, nn.RNNBase, nn.modules.rnn.RNNCellBase, nn.Bilinear)
_OWN = (*_READERS, nn.EmbeddingBag, nn.modules.conv._ConvNd)


def is_read(site: Site) -> bool:
    """Whether every owner of a tensor reads it by itself: a matrix, or whatever torch's own do."""
    return not site.is_call and all(_is_read(m, site.whole) for m, _ in site.owners)


def _is_read(module: nn.Module, tensor: Tensor) -> bool:
    if isinstance(module, (_READ_ONLY, *_READERS)):
        return True
    looks_up = isinstance(module, nn.Embedding)  # by rows, and else may write as it reads
    return tensor.dim() > 1 and maps.kind_of(module) is None and not looks_up


def in_order(site: Site) -> bool:
    """Whether who reads a tensor does so at once, in a call whose inputs have rows: in no stack."""
    module = site.module
    return isinstance(module, _OWN) or (site.whole.dim() < 3 and not isinstance(module, _READ_ONLY))


class Reading(Mixed):
    """A subclass says what is read by the contents of one slot."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.has_call = False  # but the module's own, which reads

    def now(self) -> tuple[Tables, int] | None:
        """The tables in force, and the place in them; None for the base. Raises PeftliteError."""
        rows = self.router.now()
        if isinstance(rows, ByToken):
            raise Lost
        slot, *others = (0,) if rows is None else rows.by_slot()
        if others:
            raise PeftliteError(
                f"{self.address} is read in no call whose rows can be told apart: leave it out of "
                "the bank's methods with exclude="
            )
        if rows is None or not slot:
            return None
        return (self.tables, slot) if rows.tables is None else (rows.tables(self), 0)


class ReadDense(Reading, Dense):
    """W + D_k: of matrices that aren't changed by a low rank, and of vectors."""

    def value(self, w: Tensor) -> Tensor:
        found = self.now()
        if found is None:
            return w
        tables, k = found
        return (w + tables["d"][k]).to(w.dtype)


class ReadLowRank(Reading, MixedLowRank):
    """W + s_k·B_k A_k, for one matrix or a stack of them."""

    @staticmethod
    def suits(site: Site) -> None:
        """Wherever it is read."""

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """A (*stack, r, i), B (*stack, o, r) and s; None for the base."""
        found = self.now()
        if found is None:
            return None
        tables, k = found
        if tables is self.tables:
            contents = self.contents_of(k)
            return contents["a"], contents["b"], contents["scale"]
        a, b, scale = (tables[name][k] for name in ("a", "b", "scale"))
        if self.training and "dropout" in tables:
            a = dropped(a, float(tables["dropout"][k]))
        return a, b, float(scale)

    def value(self, w: Tensor) -> Tensor:
        found = self.factors()
        if found is None:
            return w
        a, b, scale = found
        dtype = wide(w, a)
        change = self.layout.product(a.to(dtype), b.to(dtype))
        return torch.add(w, change, alpha=scale).to(w.dtype)

    def product(self) -> tuple[Tensor, Tensor, Any] | None:
        if self.layout.joined:
            return None
        rows = self.router.now()
        found = self._every(rows) if isinstance(rows, ByToken) else self.factors()
        return found and (*self.layout.factors(*found[:2]), found[2])

    def _every(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """A (*stack, k, r, i), B (*stack, k, o, r) and s (k,) of every slot. Raises Lost."""
        tables = self.tables if rows.tables is None else rows.tables(self)
        if self.training and "dropout" in tables:
            raise Lost
        r = int(tables["rank"].max())
        at = len(self.layout.stack)
        a, b = (tables[name].movedim(0, at) for name in ("a", "b"))
        return a[..., :r, :], b[..., :r], tables["scale"]
