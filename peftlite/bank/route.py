"""Route: which slot of a bank every row of a batch takes, for the context that says so.

A `with` gives a context its rows and holds their slots, so what a forward reads cannot change under
it. Compiled code asks an opaque operation as it runs: slots are numbers in a tensor, and another
mix of deltas is the same graph.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from peftlite.bank.rows import ByToken, Rows
from peftlite.core.choice import Scoped
from peftlite.core.patch import Patch
from peftlite.core.tokens import Lost
from peftlite.errors import PeftliteError
from peftlite.kernels.ops import op

_batch_size: ContextVar[int | None] = ContextVar("peftlite_batch_size", default=None)
"""Of the batch that the model was called with."""

routers: WeakValueDictionary[int, Router] = WeakValueDictionary()
_numbers = itertools.count()


class Router:
    """What the sites of one bank ask for the rows in force."""

    def __init__(self) -> None:
        self._rows = Scoped[Rows | None](None)
        self.number: int = next(_numbers)
        self.traced: Tensor | None = None  # of the call that is being compiled
        self.trains: bool = False  # whether compiled code has gradients to give
        self.leaves: WeakValueDictionary[int, Any] = WeakValueDictionary()  # by slot
        self._training, self._lock = 0, threading.Lock()
        with torch.inference_mode(False):
            self.anchor: Tensor = torch.zeros((), device="cpu", requires_grad=True)
        self.ran = False  # whether the model has run, or is about to
        routers[self.number] = self

    def scope(self, rows: Rows) -> AbstractContextManager[None]:
        """A `with` in which this context's batches have these rows."""
        return self._rows.scope(rows)

    @contextmanager
    def training(self, rows: Rows, leaves: Mapping[int, Any]) -> Iterator[None]:
        """As `scope`, where slots have something to learn."""
        self.leaves.update(leaves)
        self._trains(1)
        try:
            with self.scope(rows):
                yield
        finally:
            self._trains(-1)

    def _trains(self, more: int) -> None:
        with self._lock:
            self._training += more
            self.trains = self._training > 0

    def now(self) -> Rows | None:
        """The rows in force here; None where all are the base's."""
        rows = self._rows.now()
        return rows if isinstance(rows, Rows) else None

    def rows(self, x: Tensor) -> Rows | None:
        """The rows of a site's input, checked to be there. Raises PeftliteError."""
        if torch.compiler.is_compiling():
            slots = self.traced
            if slots is None:
                slots = torch.ops.peftlite.rows(x, self.number, False)
            rows, size = Rows(slots), len(slots)
        else:
            rows, size = self.now(), _batch_size.get()
            if rows is None:
                return None
            if isinstance(rows, ByToken):
                raise Lost
            rows = rows.on(x.device)
        b = len(rows.slots)
        if b > 1:  # else it's the same wherever the rows are
            _check(x, b if size is None else size, size)
        return rows


def _check(x: Tensor, batch: int, size: int | None) -> None:
    """Raises PeftliteError unless the entries of x are a batch's, one row after another."""
    n = len(x) if x.dim() > 1 else 1
    turned = n != size and x.dim() > 2 and x.shape[1] == size
    if n % batch or turned:
        raise PeftliteError(
            f"a map inside the model has an input of shape {tuple(x.shape)}, which isn't a batch "
            f"of {batch} rows, one after another: leave it out of the bank's methods with exclude="
        )


@op(
    "rows(Tensor x, int router, bool batch) -> Tensor",
    fake=lambda x, *_: x.new_empty(len(x), dtype=torch.int64),
)
def _rows(x: Tensor, router: int, batch: bool) -> Tensor:
    """The slot of each entry of x, the model's batch or a site's, as it is when the graph runs."""
    rows, n = routers[router].now(), len(x)
    if rows is None:
        return torch.zeros(n, dtype=torch.int64, device=x.device)
    if rows.tables is not None:
        _fill(routers[router], rows)
    _check_batch(rows, n) if batch else _check(x, len(rows.slots), None)
    # a graph may write into what it was given, so never the rows' own
    slots = rows.on(x.device).numbers
    return slots.repeat_interleave(n // len(slots), output_size=n)


def _fill(router: Router, rows: Rows) -> None:
    """Has slots hold what is made of parameters. Raises PeftliteError if some would be dropped."""
    for slot in set(rows.numbers.tolist()):
        if (leaves := router.leaves.get(slot)) is not None:
            leaves.fill()
            if router.trains and leaves.drops:
                raise PeftliteError(
                    "dropout of a delta isn't drawn by compiled code that trains many: leave "
                    "dropout= out, or torch.compile"
                )


def _check_batch(rows: Rows, n: int) -> None:
    """Raises PeftliteError unless a batch of n rows has a name for each, or as many as was said."""
    b = len(rows.slots)
    if rows.lies:  # of a training step, which has as many as were named
        b, fits = b * rows.repeat, n == b * rows.repeat
    else:
        fits = n in (b, b * rows.repeat)
    if b == 1 or fits or n == b * _made_of_each():
        return
    raise PeftliteError(
        f"{b} rows were named, and the batch has {n}: name one delta, or None, per batch row; "
        "bank.rows(names, repeat=k) where k rows in turn share a name"
    )


def _made_of_each() -> int:
    """How many rows transformers' `generate`, where it is at work here, makes of each it is given:
    its beams, or the sequences that it returns."""
    frame = sys._getframe(1)
    while frame is not None:
        if (config := frame.f_locals.get("generation_config")) is not None:
            counts = (getattr(config, name, 1) for name in ("num_beams", "num_return_sequences"))
            return max(count or 1 for count in counts)
        frame = frame.f_back
    return 1


class Entrance(Patch):
    """At the model's own call: the batch has the rows that were named, and all sites the same."""

    router: Router
    move: Callable[[Callable[[Tensor], Tensor]], None]

    def __init__(self, router: Router, move: Callable[[Callable[[Tensor], Tensor]], None]):
        super().__init__()
        self.router, self.move = router, move

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.move(fn)
        return super()._apply(fn, recurse)

    def call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        batch = _batch(args, kwargs)
        if batch is None:
            return inner(*args, **kwargs)
        if torch.compiler.is_compiling():
            self.router.traced = torch.ops.peftlite.rows(batch, self.router.number, True)
            try:
                return inner(*args, **kwargs)
            finally:
                self.router.traced = None
        self.router.ran = True
        rows = self.router.now()
        if rows is None:
            return inner(*args, **kwargs)
        _check_batch(rows, len(batch))
        token = _batch_size.set(len(batch))
        try:
            return inner(*args, **kwargs)
        finally:
            _batch_size.reset(token)


def _batch(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The argument whose first dimension is the batch: the first matrix, or else vector."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    return next((t for t in tensors if t.dim() > 1), tensors[0] if tensors else None)
