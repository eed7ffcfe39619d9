"""Batches: which examples make up a step, on the device; and a batch written to be looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from peftlite.errors import PeftliteError
from peftlite.io.files import write_file
from peftlite.table import short
from peftlite.train.state import mixed

Collate = Callable[[list[Any]], Any]


class Batches:
    """The batches of a dataset, a pure function of the step: there is no position to be lost.

    An epoch's last batch may be smaller. A dataset may have `order(generator)`, which gives the
    indices of an epoch, and `set_epoch(epoch)`, called before every batch.
    """

    def __init__(
        self,
        data: Any,
        size: int,
        collate: Collate,
        device: torch.device,
        seed: int | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.data, self.size, self.collate, self.device = data, size, collate, device
        self.share = share  # which of how many processes this is
        self.seed = seed  # None: in the order of the data
        self.per_epoch = math.ceil(len(data) / size)
        self._epoch, self._order = -1, range(0)

    def of(self, step: int, parts: int = 1) -> Iterator[tuple[Any, int]]:
        """A step's batch in parts of nearly one size, each with its number of examples.

        Every process gets as many parts. Where examples don't suffice, a part is a stand-in: an
        example that counts for nothing, 0 of them.
        """
        epoch, position = divmod(step, self.per_epoch)
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._ordered(epoch)
        indices = self._order[position * self.size : (position + 1) * self.size]
        rank, processes = self.share
        rounds = min(parts, math.ceil(len(indices) / processes))
        for part in np.array_split(indices, rounds * processes)[rank::processes]:
            examples = [self.data[int(index)] for index in (part if len(part) else indices[:1])]
            yield self._moved(self.collate(examples)), len(part)

    def all(self) -> Iterator[tuple[Any, int]]:
        """Every batch of the first epoch."""
        return (batch for step in range(self.per_epoch) for batch in self.of(step))

    def _ordered(self, epoch: int) -> Sequence[int]:
        if self.seed is None:
            return range(len(self.data))
        generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
        if hasattr(self.data, "order"):
            return self.data.order(generator)
        return torch.randperm(len(self.data), generator=generator).tolist()

    def _moved(self, batch: Any) -> Any:
        def move(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.to(self.device, non_blocking=True)
            return leaf.to(self.device) if hasattr(leaf, "to") else leaf

        return pytree.tree_map(move, batch)


def check_data(name: str, data: Any) -> None:
    """Raises PeftliteError unless it has a length and examples by index."""
    columns = isinstance(data, tuple) and all(isinstance(column, Tensor) for column in data)
    if isinstance(data, Mapping | str | Tensor) or columns:
        advice = ": torch.utils.data.TensorDataset(x, y) is one of tensors"
    elif isinstance(data, torch.utils.data.DataLoader):
        advice = ": give its dataset, and its collate_fn as collate="
    elif hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        if not len(data):
            raise PeftliteError(f"{name} has no examples")
        return
    else:
        advice = ""
    raise PeftliteError(
        f"{name} must be a dataset, with a length and examples by index, not {short(data)}{advice}"
    )


def write_batch(path: Path, batch: Any) -> None:
    """Writes the tensors of a batch, named by where they are in it, to a safetensors file."""
    plain = pytree.tree_map(lambda leaf: dict(leaf) if isinstance(leaf, Mapping) else leaf, batch)
    leaves = pytree.tree_flatten_with_path(plain)[0]
    tensors = {pytree.keystr(at): leaf for at, leaf in leaves if isinstance(leaf, Tensor)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, tensors)
