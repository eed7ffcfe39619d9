"""SparseMask: W' = W + D, with D zero but at a few chosen entries, the same ones throughout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peftlite.core.maps import Map, maps_vectors, unwrap
from peftlite.core.patch import Patch, WeightMethod, apply, trainable
from peftlite.core.site import Site, whole_address
from peftlite.core.tensors import narrow
from peftlite.errors import PeftliteError
from peftlite.fields import number, one_of
from peftlite.kernels.sparse import added, sparse_linear
from peftlite.table import short

Select = Literal["magnitude", "random", "fish", "given"]


class SparsePatch(Patch):
    """W' = W with `values` (n) added at the entries `indices` (n): flat, each once, in order."""

    address: str
    shape: torch.Size
    size: int

    indices: Tensor

    def __init__(self, site: Site, n: int, dtype: torch.dtype | None):
        super().__init__()
        self.address, self.shape, self.size = site.address, site.whole.shape, site.tensor.numel()
        self.values: nn.Parameter = trainable(n, site=site, dtype=dtype)
        narrow = self.size <= torch.iinfo(torch.int32).max
        self.kind: torch.dtype = torch.int32 if narrow else torch.int64
        self.register_buffer("indices", torch.empty(n, dtype=self.kind, device=site.device))
        if site.index is not None or not all(maps_vectors(*owner) for owner in site.owners):
            self.has_call = False

    def resize(self, shapes: Mapping[str, Sequence[int]]) -> None:
        n = shapes.get("values", ())
        if len(n) == 1 and n[0] <= self.size:
            self.values.data = self.values.new_empty(n[0])
            self.indices = self.values.new_empty(n[0], dtype=self.kind)

    def verify(self) -> None:
        at = self.indices
        if at is None or not len(at):
            return
        if not (0 <= at[0] and at[-1] < self.size and bool((at[1:] > at[:-1]).all())):
            raise ValueError("indices beyond the tensor, or out of order")

    def place(self, indices: Tensor) -> None:
        """Fixes the entries, each with a difference of zero."""
        self.resize({"values": indices.shape})
        self.indices.copy_(indices)
        self.values.zero_()

    def value(self, w: Tensor) -> Tensor:
        return added(w, self.values, self.indices)

    def call(self, inner: Map, input: Tensor) -> Tensor:
        base, below = unwrap(inner)
        w = apply(below, base.weight)
        return sparse_linear(input, w, base.bias, self.values, self.indices, base.transposed)


@dataclass(frozen=True)
class EntryMethod(WeightMethod, abstract=True):
    """A method of a fraction of the entries of all its sites taken together."""

    fraction: float = number(0.005, float, lambda f: 0 < f <= 1, "above 0 and at most 1")

    takes = "tensors"

    def accepts(self, site: Site) -> bool:
        return not site.is_call

    def count(self, size: int) -> int:
        """How many of `size` entries train."""
        return min(size, max(1, round(self.fraction * size)))


@dataclass(frozen=True)
class SparseMask(EntryMethod):
    """W' = W + D, with D zero but at a fraction of the entries of all sites taken together.

    D is (o, i) at a weight. They are chosen once, at the start, and the file holds only their
    indices and differences. By default it takes every weight of a linear map but the output head's.

    Args:
        fraction: of the entries that train. FISH (Sung et al., arXiv:2111.09839, §4): 0.005.
        select: which: "magnitude": the largest |W|; "random"; "fish": the largest Fisher
            information, which is `scores=pl.fish_scores(model, loss, batches)`; "given": the
            largest of any `scores`.
        seed: of the random ones.
        scores: for every tensor's address a tensor of its shape. Not saved.
    """

    select: Select = one_of("magnitude", Select)
    seed: int = number(0, int, lambda s: 0 <= s < 2**63, "a whole number from 0 up")
    scores: InitVar[Mapping[str, Tensor] | None] = None

    # * of three small models
    rate: ClassVar[float] = 2

    def __post_init__(self, scores: Mapping[str, Tensor] | None) -> None:
        super().__post_init__()
        object.__setattr__(self, "scores", scores)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "scores": None}  # a copied or pickled model has its entries

    def build_all(self, sites: Sequence[Site]) -> list[Patch]:
        self.check(*sites)
        # even shares, until `reset_all` has seen the weights, or `resize` the file
        ends = [0, *accumulate(site.tensor.numel() for site in sites)]
        shares = [self.count(ends[-1]) * end // max(ends[-1], 1) for end in ends]
        return [
            SparsePatch(site, stop - start, self.dtype)
            for site, (start, stop) in zip(sites, pairwise(shares), strict=True)
        ]

    def reset_all(self, patches: Sequence[Any], tensors: Sequence[Any]) -> None:
        sizes = [w.numel() for w in tensors]
        count = self.count(sum(sizes))
        if not count or any(w.is_meta for w in tensors):
            return  # there is nothing to choose from, or nothing to choose by
        if self.select == "random":
            chosen = split(draw(count, sum(sizes), torch.Generator().manual_seed(self.seed)), sizes)
        else:
            pairs = list(zip(patches, tensors, strict=True))
            chosen = largest(lambda: (self._scores(*pair).reshape(-1) for pair in pairs), count)
        for patch, indices in zip(patches, chosen, strict=True):
            patch.place(indices)

    def fit_all(
        self, patches: Sequence[Any], tensors: Sequence[Any], changes: Iterable[Tensor]
    ) -> None:
        count = self.count(sum(w.numel() for w in tensors))
        chosen = largest(lambda: (change.abs().reshape(-1) for change in changes), count)
        for patch, indices, change in zip(patches, chosen, changes, strict=True):
            patch.place(indices)
            patch.values.copy_(change.reshape(-1)[indices])

    def _scores(self, patch: SparsePatch, w: Tensor) -> Tensor:
        if self.select == "magnitude":
            return w.abs()
        address = whole_address(patch.address)
        scores = self.scores.get(address) if isinstance(self.scores, Mapping) else None
        if not isinstance(scores, Tensor) or scores.shape != patch.shape:
            raise PeftliteError(
                f"select={self.select!r} goes by scores[{address!r}], a tensor of shape "
                f"{tuple(patch.shape)}, not {short(scores)}: give a score to every entry of every "
                "site, as scores=pl.fish_scores(model, loss, batches) does"
            )
        return narrow(scores, patch.index)


def largest(scores: Callable[[], Iterator[Tensor]], count: int) -> Iterator[Tensor]:
    """Where the `count` largest of all scores are, tensor by tensor; of equal ones the first.

    Goes through the scores twice, so that no more than `count` and one tensor are held at a time.
    """
    best, least = torch.empty(0), -math.inf
    for some in scores():
        best = torch.cat([best.to(some.device), some[some >= least]])
        best = best.topk(min(count, len(best)), sorted=False).values
        least = best.min().item() if len(best) == count else least
    spare = count - int((best > least).sum())  # how many of those that equal the least go in
    for some in scores():
        equal = (some == least).nonzero()[:spare, 0]
        spare -= len(equal)
        yield torch.cat([(some > least).nonzero()[:, 0], equal]).sort().values


def draw(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`count` different numbers below `size`, in order: (n) of int64."""
    if 4 * count > size:
        return torch.randperm(size, generator=generator)[:count].sort().values
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        more = torch.randint(size, (count + 8,), generator=generator)
        found = torch.cat([found, more]).unique()
    kept = torch.randperm(len(found), generator=generator)[:count]
    return found[kept].sort().values


def split(indices: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Indices into tensors laid end to end, as indices into each."""
    starts = torch.tensor([0, *accumulate(sizes)][:-1])
    parts = indices.tensor_split(torch.searchsorted(indices, starts[1:]))
    return [part - start for part, start in zip(parts, starts, strict=True)]
