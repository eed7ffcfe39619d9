"""Content: what a delta's file says, whatever its format: methods with their sites, and tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from peftlite.core.patch import Method
from peftlite.io.files import Entry, numel
from peftlite.table import Shown, size, table


@dataclass
class Content:
    """A delta in a file, as its format's reader understood it; nothing of it is checked yet.

    Args:
        name: the delta's.
        methods: each with the addresses of its sites.
        entries: the dtype and shape of every tensor, by `address:parameter`.
        get: a tensor's values; raises FileError if they are damaged.
        base: the fingerprint of every tensor that is changed; None where the format has none.
        modules: what it says of the module around each of them; see standin.py.
    """

    name: str
    methods: list[tuple[Method, list[str]]]
    entries: dict[str, Entry]
    get: Callable[[str], Tensor]
    base: dict[str, dict[str, Any]] | None = None
    modules: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def evened(self) -> Content:
        """The same, each site's floating-point tensors in the widest of their dtypes."""
        wide: dict[str, torch.dtype] = {}
        for key, its in self.entries.items():
            if its.dtype.is_floating_point and its.dtype.itemsize > 1:
                address = key.rpartition(":")[0]
                wide[address] = torch.promote_types(wide.get(address, its.dtype), its.dtype)

        def dtype(key: str) -> torch.dtype:
            own = self.entries[key].dtype
            wider = own.is_floating_point and own.itemsize > 1
            return wide[key.rpartition(":")[0]] if wider else own

        entries = {key: its._replace(dtype=dtype(key)) for key, its in self.entries.items()}
        return replace(self, entries=entries, get=lambda key: self.get(key).to(dtype(key)))

    @property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The shape of every tensor, by address and by parameter."""
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for key, entry in self.entries.items():
            address, _, parameter = key.rpartition(":")
            found.setdefault(address, {})[parameter] = entry.shape
        return found


def told(entries: Mapping[str, Entry]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and the shape of every tensor, as `Info` has them."""
    return {key: (str(its.dtype).removeprefix("torch."), its.shape) for key, its in entries.items()}


@dataclass(frozen=True, repr=False)
class Info(Shown):
    """What a file says of itself, without a model.

    `format` is "peftlite" or a peer's; a peer's `methods` name its modules as the peer does.
    `source` is the file's name on the hub, of its commit, if that is where it's from.
    `modules` tells of what kind is the module around each tensor that is changed (see standin.py);
    where it doesn't, `transposed` says whether a matrix is (i, o).
    """

    name: str
    methods: list[tuple[Method, list[str]]]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    num_bytes: int
    format: str = "peftlite"
    library: str = ""
    source: str = ""
    base: dict[str, dict[str, Any]] = field(default_factory=dict)
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    transposed: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """How many numbers its tensors hold."""
        return sum(numel(shape) for _, shape in self.tensors.values())

    def _summary(self) -> str:
        kinds = ", ".join(f"{type(m).__name__} at {len(sites)} sites" for m, sites in self.methods)
        by = f"by peftlite {self.library}" if self.library else f"of format {self.format}"
        return f"{self.name!r}: {kinds}, {size(self.num_bytes)}, {by}"

    def _lines(self) -> Iterator[str]:
        rows = [
            [key, dtype, "×".join(map(str, shape)), f"{numel(shape):,}"]
            for key, (dtype, shape) in self.tensors.items()
        ]
        yield self._summary()
        if self.source:
            yield f"fetched from {self.source}"
        yield from (f"{key}: {value}" for key, value in self.notes.items())
        if self.errors:
            worst = max(self.errors, key=lambda key: self.errors[key])
            yield f"rounded to save space: by {self.errors[worst]:.3g} at most, in {worst}"
        yield table(["tensor", "dtype", "shape", "numbers"], rows)
