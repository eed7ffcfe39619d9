"""Data: examples that are made when they are asked for, to split, pack, order and augment."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils import _pytree as pytree

from peftlite.errors import PeftliteError
from peftlite.table import short
from peftlite.train.data.augment import Augmentation
from peftlite.train.data.checks import check_counts
from peftlite.train.data.packing import Blocks, fill
from peftlite.train.data.split import split

Key = str | Callable[[Any], Any] | Sequence[Any]

PLAIN = (str, bytes, int, float, tuple, type(None))  # types with the same repr everywhere


class Cache(dict[int, Any]):
    """Examples that are kept once they are made, as long as there is room."""

    room: int

    room = 2**30  # bytes of tensors

    def keep(self, i: int, example: Any) -> Any:
        size = sum(x.nbytes for x in pytree.tree_leaves(example) if isinstance(x, Tensor))
        if size <= self.room:
            self.room -= size
            self[i] = example
        return example


def _as_it_is(row: Any) -> Any:
    """The row itself."""
    return row


@dataclass(eq=False, repr=False)
class Data(Sequence[Any]):
    """`make(rows[i])` for each i: an example, a dict of tensors as a rule.

    An example is made when it is asked for, and kept while there is room (1 GiB): don't write into
    it. A slice of data is data.

    Args:
        rows: of any form: dicts, tuples, a data set of the `datasets` library.
        make: an example out of a row; left out, rows are examples.
    """

    rows: Sequence[Any]
    make: Callable[[Any], Any] = _as_it_is
    _picks: Sequence[int] | None = None
    _augmentations: tuple[tuple[Augmentation, int], ...] = ()
    _stages: int = 1
    _epoch: int = 0
    _cache: Cache = field(default_factory=Cache)

    @property
    def picks(self) -> Sequence[int]:
        """The rows that are examples here, in their order."""
        return range(len(self.rows)) if self._picks is None else self._picks

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return replace(self, _picks=self.picks[i])
        pick = self.picks[i]
        if self._augmentations:
            return self._made(pick, self._augmented(pick))
        if pick not in self._cache:
            return self._cache.keep(pick, self._made(pick, self.rows[pick]))
        return self._cache[pick]

    def _made(self, pick: int, row: Any) -> Any:
        try:
            return self.make(row)
        except PeftliteError as error:
            raise PeftliteError(f"row {pick}: {error}") from error

    def __repr__(self) -> str:
        return f"Data({len(self)} examples)"

    @property
    def lengths(self) -> list[int]:
        """The tokens of each example; of a pair of answers, those of the longer one."""
        sides = [[e] if "input_ids" in e else [e["chosen"], e["rejected"]] for e in self]
        return [max(len(side["input_ids"]) for side in each) for each in sides]

    def split(
        self, *shares: float, seed: int = 0, group: Key | None = None, stratify: Key | None = None
    ) -> tuple[Data, ...]:
        """The rest, and a part for each share: `train, val, test = data.split(0.1, 0.1)`.

        The same rows and seed give the same parts, everywhere. Rows of one group stay together,
        and the parts come as near to their shares as any choice of whole groups can; so does each
        part of each stratum, which is to a row where there are no groups.

        Args:
            shares: of the examples, each in (0, 1), together less than 1.
            group: a field's name, a function of a row, or one value for each example.
            stratify: the same, of a value that is to have its share in every part: a label.

        Raises PeftliteError if the shares aren't such, or a part would be empty.
        """
        if not shares or min(shares) <= 0 or sum(shares) >= 1:
            raise PeftliteError(
                f"give the shares to take out, such as 0.1, together less than 1: not {shares}"
            )
        groups = range(len(self)) if group is None else self.values(group)
        strata = [None] * len(self) if stratify is None else self.values(stratify)
        parts = split(groups, strata, shares, seed)
        if not all(parts):
            smallest = min(Counter(groups).values(), default=0)
            raise PeftliteError(
                f"shares of {shares} of {len(self)} examples leave a part empty: the smallest of "
                f"{len(set(groups))} groups has {smallest}; give other shares, or more examples"
            )
        return tuple(replace(self, _picks=[self.picks[i] for i in part]) for part in parts)

    def curriculum(self, key: Key, stages: int | None = None) -> Data:
        """The same examples, to be seen from the lowest key to the highest in every epoch.

        Args:
            key: a field's name, a function of a row, or one value for each example, such as
                `data.lengths`.
            stages: parts of equal size, each shuffled for itself; left out, nothing is shuffled.

        Raises PeftliteError if `stages` is no count, or the key has no values.
        """
        check_counts(stages=stages)
        values = self.values(key)
        picks = [self.picks[i] for i in sorted(range(len(self)), key=values.__getitem__)]
        return replace(self, _picks=picks, _stages=stages or len(self))

    def order(self, generator: Generator | None = None) -> list[int]:
        """The order of an epoch: shuffled, within the stages of a curriculum if there is one."""
        n = len(self)
        place = torch.rand(n, dtype=torch.float64, generator=generator)
        return (torch.arange(n) * self._stages // max(n, 1) + place).argsort().tolist()

    def augment(self, augmentation: Augmentation, seed: int = 0) -> Data:
        """The same, with `augmentation(row, generator)` in place of every row, anew in each epoch.

        The augmented row is a function of the seed, the epoch and the row alone.
        """
        return replace(self, _augmentations=(*self._augmentations, (augmentation, seed)))

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that augmentations are drawn for."""
        self._epoch = epoch

    def _augmented(self, pick: int) -> Any:
        row = self.rows[pick]
        for place, (augmentation, seed) in enumerate(self._augmentations):
            what = f"{seed} {self._epoch} {pick} {place}".encode()
            number = int.from_bytes(hashlib.sha256(what).digest()[:8], "big")
            row = augmentation(row, Generator().manual_seed(number >> 1))
        return row

    def pack(self, length: int) -> Blocks:
        """Blocks of at most `length` tokens, of several examples each, which don't see one another.

        Their order is shuffled, so a curriculum ends here. Raises PeftliteError for an example that
        is longer, for augmented data, and for answers that are compared or rated.
        """
        if self._augmentations:
            raise PeftliteError(
                "augmented examples have other lengths in each epoch: pack those that aren't"
            )
        if len(self) and {"margin", "rating"} & self[0].keys():
            raise PeftliteError("answers that are compared or rated aren't packed: batch them")
        lengths = self.lengths
        return Blocks(self, lengths, fill(lengths, length), length)

    def values(self, key: Key) -> list[Any]:
        """A key's value for each example. Raises PeftliteError if it has none, or no plain ones."""
        if isinstance(key, str):
            found = [self._field(pick, key) for pick in self.picks]
        elif callable(key):
            found = [key(self.rows[pick]) for pick in self.picks]
        elif len(key) == len(self):
            found = list(key)
        else:
            raise PeftliteError(f"there are {len(self)} examples, and {len(key)} values for them")
        plain = [value.item() if hasattr(value, "item") else value for value in found]
        for value in plain:
            if not isinstance(value, PLAIN):
                raise PeftliteError(
                    f"a key's values are texts, numbers or tuples of them: not {short(value)}"
                )
        return plain

    def _field(self, pick: int, key: str) -> Any:
        try:
            return self.rows[pick][key]
        except (KeyError, TypeError, IndexError) as error:
            raise PeftliteError(f"row {pick} has no field {key!r}") from error
