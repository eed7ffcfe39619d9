"""Loader: which examples make up a step, on the device; and a batch written to be looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from peftlite.errors import PeftliteError
from peftlite.io.files import write_file
from peftlite.table import short
from peftlite.train.state import mix_seeds

Collate = Callable[[list[Any]], Any]


@dataclass(eq=False)
class Loader:
    """The batches of a dataset, a pure function of the step: there is no position to be lost.

    An epoch's last batch may be smaller. A dataset may have `order(generator)`, which gives the
    indices of an epoch, and `set_epoch(epoch)`, called before every batch.

    Args:
        batch_size: examples of a step, over all processes.
        seed: of the order; None leaves the data in its own.
        rank, processes: which of how many processes this is.
    """

    dataset: Any
    batch_size: int
    collate: Collate
    device: torch.device
    seed: int | None = None
    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        self.steps_per_epoch: int = math.ceil(len(self.dataset) / self.batch_size)
        self._epoch, self._order = -1, range(0)

    def micro_batches(self, step: int, accumulate: int = 1) -> Iterator[tuple[Any, int]]:
        """A step's batch in parts of nearly one size, each with its number of examples.

        Every process gets as many parts. Where examples don't suffice, a part is a stand-in: an
        example that counts for nothing, 0 of them.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        indices = self._order[position * self.batch_size : (position + 1) * self.batch_size]
        rounds = min(accumulate, math.ceil(len(indices) / self.processes))
        parts = np.array_split(indices, rounds * self.processes)
        for part in parts[self.rank :: self.processes]:
            examples = [self.dataset[int(i)] for i in (part if len(part) else indices[:1])]
            yield self._to_device(self.collate(examples)), len(part)

    def epoch(self) -> Iterator[tuple[Any, int]]:
        """Every batch of the first epoch."""
        steps = range(self.steps_per_epoch)
        return (batch for step in steps for batch in self.micro_batches(step))

    def _order_of(self, epoch: int) -> Sequence[int]:
        if self.seed is None:
            return range(len(self.dataset))
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, epoch))
        if hasattr(self.dataset, "order"):
            return self.dataset.order(generator)
        return torch.randperm(len(self.dataset), generator=generator).tolist()

    def _to_device(self, batch: Any) -> Any:
        def move(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.to(self.device, non_blocking=True)
            return leaf.to(self.device) if hasattr(leaf, "to") else leaf

        return pytree.tree_map(move, batch)


def check_dataset(name: str, dataset: Any) -> None:
    """Raises PeftliteError unless it has a length and examples by index."""
    columns = isinstance(dataset, tuple) and all(isinstance(column, Tensor) for column in dataset)
    if isinstance(dataset, Mapping | str | Tensor) or columns:
        advice = ": torch.utils.data.TensorDataset(x, y) is one of tensors"
    elif isinstance(dataset, torch.utils.data.DataLoader):
        advice = ": give its dataset, and its collate_fn as collate="
    elif hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        if not len(dataset):
            raise PeftliteError(f"{name} has no examples")
        return
    else:
        advice = ""
    raise PeftliteError(
        f"{name} must be a dataset, with a length and examples by index, not "
        f"{short(dataset)}{advice}"
    )


def write_batch(path: Path, batch: Any) -> None:
    """Writes the tensors of a batch to a safetensors file, by their paths in the batch."""
    plain = pytree.tree_map(lambda leaf: dict(leaf) if isinstance(leaf, Mapping) else leaf, batch)
    leaves = pytree.tree_flatten_with_path(plain)[0]
    tensors = {pytree.keystr(key): leaf for key, leaf in leaves if isinstance(leaf, Tensor)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, tensors)
