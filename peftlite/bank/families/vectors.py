"""Vectors of every row's own: (IA)³ on the inputs or outputs of a map, biases, scales of norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlite.bank.arena import Field
from peftlite.bank.families.affine import one_of
from peftlite.bank.families.gather import along, rescaled
from peftlite.bank.families.linear import called_as_map, difference
from peftlite.bank.families.mixed import Contents, Mixed, is_whole
from peftlite.bank.rows import Rows, Tables
from peftlite.core import maps
from peftlite.core.maps import Map
from peftlite.core.patch import Patch
from peftlite.core.site import Site
from peftlite.errors import TargetError
from peftlite.methods.bitfit import AddedBiasPatch
from peftlite.methods.features import is_called, of_layer
from peftlite.methods.full import AddPatch
from peftlite.methods.ia3 import ScalePatch


class MixedOutputs(Mixed):
    """y' = y + (l_k − 1) ⊙ (y − b): (IA)³ behind a map, whose bias has a vector of its own."""

    width: int
    dtype: torch.dtype

    learned: ClassVar[tuple[str, ...]] = ("l",)

    @staticmethod
    def suits(site: Site) -> None:
        called_as_map(site)

    def __init__(self, site: Site, patch: ScalePatch, max_rank: int):
        super().__init__(site, patch, max_rank)
        self.dim: int = site.layout.dim(patch.inputs)  # of W, along which l lies
        self.width, self.dtype = site.shape[self.dim], patch.l.dtype

    def fields(self) -> dict[str, Field]:
        return {"l": Field((self.width,), self.dtype, 1.0)}

    def encode(self, patches: Sequence[Any]) -> Contents:
        l = torch.ones(self.width, dtype=torch.float64, device="cpu")  # noqa: E741
        for patch in patches:
            dim, start, stop = patch.index or (self.dim, 0, self.width)
            if dim != self.dim:
                raise self.cannot("be mixed by rows on a part across what it scales", patch)
            l[start:stop] = patch.l
        return {"l": l}

    def trains(self, patches: Sequence[Any]) -> bool:
        return is_whole(patches)

    def mix(
        self, rows: Rows, tables: Tables, inner: Map, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        y = inner(input, *args, **kwargs)
        return rescaled(y, inner.bias, tables["l"] - 1, rows)


class MixedInputs(MixedOutputs):
    """y' = W(l_k ⊙ x) + b: (IA)³ in front of a map."""

    def mix(
        self, rows: Rows, tables: Tables, inner: Map, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        x = (input * along(tables["l"], rows, input, -1)).to(input.dtype)
        return inner(x, *args, **kwargs)


class MixedVector(Mixed):
    """y' = y + d_k ⊙ n(x): of a bias, where n is 1, or of a norm's scale, with n what it scales."""

    width: int
    dim: int
    unit: Any

    at_call = True
    learned: ClassVar[tuple[str, ...]] = ("d",)
    trained: ClassVar[tuple[type[Patch], ...]] = (AddPatch, AddedBiasPatch)

    def __init__(self, site: Site, patch: Any, max_rank: int):
        super().__init__(site, patch, max_rank)
        self.unit = None
        if site.is_call:  # a bias that the layer was made without
            self.width, self.dim = len(patch.d), -1 - patch.after
        else:
            self.width, self.dim, self.unit = len(site.whole), *_affine(site)
        self.dtype: torch.dtype = next((p.dtype for p in patch.parameters()), site.parameter_dtype)

    def fields(self) -> dict[str, Field]:
        return {"d": Field((self.width,), self.dtype)}

    def encode(self, patches: Sequence[Any]) -> Contents:
        if self.trains(patches):
            return {"d": self.parameter(patches[0], "d")}
        return {"d": difference(patches, self.site.whole)}

    def parameter(self, patch: Any, name: str) -> Tensor:
        return patch.difference if isinstance(patch, AddPatch) else patch.d

    def mix(self, rows: Rows, tables: Tables, inner: Callable, *args: Any, **kwargs: Any) -> Tensor:
        y = inner(*args, **kwargs)
        change = along(tables["d"], rows, y, self.dim)
        if self.unit is not None:
            change = change * self.unit.forward(*args, **kwargs)  # the module's hooks have run
        return y + change.to(y.dtype)


def _affine(site: Site) -> tuple[int, nn.Module | None]:
    """The dimension of a layer's features, and n as a module, None for 1. Raises TargetError."""
    module, features = site.module, of_layer(site.module)
    if features is None or site.whole.dim() != 1 or not is_called(module):
        raise _unlike(site)
    kinds = {maps.kind_of(m) for m, _ in site.owners}
    if site.slot == "bias" and not kinds & {None, maps.Embedding}:
        return features.dim, None
    if len(site.owners) > 1:
        raise _unlike(site)
    return features.dim, one_of(site, features.dim, _unlike(site))


def _unlike(site: Site) -> TargetError:
    return TargetError(
        f"{site.address} is no vector that its module's output is affine in, row by row, so rows "
        "can't have their own: leave it out of the bank's methods with exclude="
    )
