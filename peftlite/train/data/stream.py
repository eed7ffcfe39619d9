"""Streams: data without examples by index, which is gone through from its beginning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from peftlite.errors import PeftliteError
from peftlite.table import short
from peftlite.train.state import mix_seeds, seeded


def is_indexed(data: Any) -> bool:
    """Whether data has a length, and examples by index."""
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


def is_stream(data: Any) -> bool:
    """Whether data is torch's `IterableDataset`, or else has an order but no examples by index."""
    iterable = hasattr(data, "__iter__") and not isinstance(data, DataLoader)
    return isinstance(data, IterableDataset) or (iterable and not is_indexed(data))


def check_restarts(name: str, data: Iterable[Any]) -> None:
    """Raises PeftliteError for what can be gone through only once."""
    if iter(data) is data:
        raise PeftliteError(
            f"{name} is {short(data)}, which can be gone through only once: give a list of it, or "
            "an object whose __iter__ begins anew"
        )


@dataclass(eq=False, repr=False)
class Stream(IterableDataset[Any]):
    """`make(row)` for each row, as the rows come; each pass begins anew.

    The rows are read in this process, and a trainer's workers make the examples.

    Args:
        rows: an iterable of rows, such as an `IterableDataset` of torch or of `datasets`.
        make: an example out of a row.

    Raises:
        PeftliteError: the rows can be gone through only once; or later, a row is no example.

    Example:
        class Numbers(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter(range(1000))

        data = pl.data.Stream(Numbers(), lambda n: {"input_ids": torch.arange(n)})
        assert len(next(iter(data))["input_ids"]) == 0
    """

    rows: Iterable[Any]
    make: Callable[[Any], Any]

    def __post_init__(self) -> None:
        check_restarts("rows", self.rows)

    def __iter__(self) -> Iterator[Any]:
        return map(self.made, self.keys())

    def __repr__(self) -> str:
        return f"Stream({short(self.rows)})"

    def keys(self) -> Iterator[tuple[int, Any]]:
        """The rows, each with its number: what `made` takes."""
        return enumerate(self.rows)

    def made(self, key: tuple[int, Any]) -> Any:
        """The example of a row. Raises PeftliteError if it is none."""
        number, row = key
        try:
            return self.make(row)
        except PeftliteError as error:
            raise PeftliteError(f"row {number}: {error}") from error

    def set_epoch(self, epoch: int) -> None:
        """Passes on which pass through the rows is the next."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


class Reader:
    """The rows of each step, a pure function of the step: of an earlier one, it begins anew.

    Where the data ends it is gone through again, after `set_epoch(pass)` if it has that.

    Args:
        size: the rows of a step.
        seed: of what the data draws as it is read, together with the step.
    """

    data: Any
    step: int

    def __init__(self, data: Any, size: Callable[[int], int], seed: int) -> None:
        self.data, self.step, self._size, self._seed = data, 0, size, seed
        self._pass, self._rows = -1, iter(())

    def rows(self, step: int) -> list[Any]:
        """The rows of a step. Raises PeftliteError if a pass gives none."""
        if step < self.step:
            self.step, self._pass, self._rows = 0, -1, iter(())
        for skipped in range(self.step, step):  # as it goes on after a break
            self._read(skipped)
        self.step = step + 1
        return self._read(step)

    def _read(self, step: int) -> list[Any]:
        size = self._size(step)
        with seeded(mix_seeds(self._seed, step)):
            rows = [*islice(self._rows, size)]
            while len(rows) < size:
                self._begin()
                if not (more := [*islice(self._rows, size - len(rows))]):
                    raise PeftliteError(
                        f"pass {self._pass + 1} through {short(self.data)} gave no rows: its "
                        "__iter__ has to begin anew each time"
                    )
                rows += more
        return rows

    def _begin(self) -> None:
        self._pass += 1
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(self._pass)
        self._rows = self.data.keys() if isinstance(self.data, Stream) else iter(self.data)
