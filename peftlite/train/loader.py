"""Loader: which examples make up a step, on the device; and a batch written to be looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from peftlite.errors import PeftliteError
from peftlite.io.files import write_file
from peftlite.train.data.stream import Reader, Stream, is_stream
from peftlite.train.state import mix_seeds, seeded

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Part:
    """What a process computes at a time of a step.

    Attributes:
        keys: what the examples are made of: their indices, or the rows of a stream.
        examples: how many count: none in a stand-in.
        seed: of what is drawn as they are made.
    """

    keys: Sequence[Any]
    examples: int
    epoch: int
    seed: int


@dataclass(eq=False)
class Maker(Dataset[Any]):
    """Makes batches of parts, here or in workers: a pure function of the part."""

    dataset: Any
    collate: Collate

    def make(self, part: Part) -> tuple[Any, int]:
        """The batch, and how many of its examples count."""
        with seeded(part.seed):
            return self.collate(self._examples(part)), part.examples

    def _examples(self, part: Part) -> list[Any]:
        if is_stream(self.dataset):
            made = self.dataset.made if isinstance(self.dataset, Stream) else lambda row: row
            return [made(key) for key in part.keys]
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(part.epoch)
        if hasattr(self.dataset, "__getitems__"):  # torch's word for several at once
            return self.dataset.__getitems__(part.keys)
        return [self.dataset[i] for i in part.keys]

    def __getitem__(self, part: Part) -> Any:
        """The same in a worker: an error of ours as it is, without the worker's traceback."""
        try:
            return self.make(part)
        except PeftliteError as error:
            return error


@dataclass(eq=False)
class Loader:
    """The batches of a dataset, a pure function of the step: there is no position to be lost.

    An epoch's last batch may be smaller. A dataset may have `order(generator)`, which gives the
    indices of an epoch, and `set_epoch(epoch)`, called before every batch.

    Args:
        batch_size: examples of a step, over all processes.
        accumulate: parts that a step's batch comes in.
        seed: of the order, and of what is drawn as examples are made.
        shuffle: False leaves the data in its own order, as a stream always is.
        workers: processes that make batches ahead; the same ones as are made here with none.
        examples: of an epoch; None: as many as the dataset has.
        rank, processes: which of how many processes this is.
    """

    dataset: Any
    batch_size: int
    collate: Collate
    device: torch.device
    accumulate: int = 1
    seed: int = 0
    shuffle: bool = True
    workers: int = 0
    examples: int | None = None
    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        self.total: int = len(self.dataset) if self.examples is None else self.examples
        self.steps_per_epoch: int = math.ceil(self.total / self.batch_size)
        self._epoch, self._order = -1, range(0)
        self._maker = Maker(self.dataset, self.collate)
        self._reader = Reader(self.dataset, self._size, self.seed)
        self._step, self._running = -1, iter(())

    def micro_batches(self, step: int) -> Iterator[tuple[Any, int]]:
        """A step's batch in parts of nearly one size, each with its number of examples.

        Every process gets as many parts. Where examples don't suffice, a part is a stand-in: an
        example that counts for nothing, 0 of them.
        """
        return map(self._to_device, map(self._maker.make, self._parts(step)))

    def ahead(self, step: int) -> Iterator[tuple[Any, int]]:
        """The same, by workers if there are any: they make the next steps' in the meantime."""
        if not self.workers:
            return self.micro_batches(step)
        if step != self._step:
            self._running = self._by_workers(count(step))
        self._step = step + 1
        return islice(self._running, self._rounds(step))

    def epoch(self) -> Iterator[tuple[Any, int]]:
        """Every batch of the first epoch."""
        steps = range(self.steps_per_epoch)
        if self.workers:
            return self._by_workers(steps)
        return (batch for step in steps for batch in self.micro_batches(step))

    def close(self) -> None:
        """Ends the workers."""
        self._step, self._running = -1, iter(())

    def _by_workers(self, steps: Iterable[int]) -> Iterator[tuple[Any, int]]:
        parts: Any = (part for step in steps for part in self._parts(step))
        options = {"num_workers": self.workers, "collate_fn": _as_it_is}
        # its seed would be drawn from what the model draws from
        made = DataLoader(self._maker, None, sampler=parts, generator=torch.Generator(), **options)
        for batch in made:
            if isinstance(batch, PeftliteError):
                raise batch
            yield self._to_device(batch)

    # -- what a step is

    def _size(self, step: int) -> int:
        position = step % self.steps_per_epoch
        return min(self.batch_size, self.total - position * self.batch_size)

    def _rounds(self, step: int) -> int:
        """The parts that each process has of a step."""
        return min(self.accumulate, math.ceil(self._size(step) / self.processes))

    def _parts(self, step: int) -> Iterator[Part]:
        """This process's."""
        keys, epoch = self._keys(step), step // self.steps_per_epoch
        cuts = np.array_split(range(len(keys)), self._rounds(step) * self.processes)
        for number in range(self.rank, len(cuts), self.processes):
            chosen = [keys[i] for i in cuts[number]]
            seed = mix_seeds(self.seed, step, number)
            yield Part(chosen or keys[:1], len(chosen), epoch, seed)

    def _keys(self, step: int) -> Sequence[Any]:
        if is_stream(self.dataset):
            return self._reader.rows(step)
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            self._epoch, self._order = epoch, self._order_of(epoch)
        first = position * self.batch_size
        return [int(i) for i in self._order[first : first + self.batch_size]]

    def _order_of(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(self.total)
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, epoch))
        if hasattr(self.dataset, "order"):
            return self.dataset.order(generator)
        return torch.randperm(self.total, generator=generator).tolist()

    def _to_device(self, made: tuple[Any, int]) -> tuple[Any, int]:
        def move(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.to(self.device, non_blocking=True)
            return leaf.to(self.device) if hasattr(leaf, "to") else leaf

        batch, examples = made
        return pytree.tree_map(move, batch), examples


def _as_it_is(batch: Any) -> Any:
    return batch


def write_batch(path: Path, batch: Any) -> None:
    """Writes the tensors of a batch to a safetensors file, by their paths in the batch."""
    plain = pytree.tree_map(lambda leaf: dict(leaf) if isinstance(leaf, Mapping) else leaf, batch)
    leaves = pytree.tree_flatten_with_path(plain)[0]
    tensors = {pytree.keystr(key): leaf for key, leaf in leaves if isinstance(leaf, Tensor)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, tensors)
