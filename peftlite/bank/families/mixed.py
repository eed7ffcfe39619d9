"""Mixed: the patch that a bank plants at a site, where every row is changed by its own delta."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftlite.bank.arena import Arena, Field
from peftlite.bank.compiled import learned
from peftlite.bank.route import Router
from peftlite.bank.rows import Rows, Tables
from peftlite.core.patch import Patch
from peftlite.core.site import CALL, Site
from peftlite.errors import PeftliteError

Contents = dict[str, Tensor | float]
"""What one slot holds at a site, by the names of its fields."""


class Mixed(Patch):
    """The deltas of a bank at one site, for one family of methods.

    A subclass says what a slot holds (`fields`), what that is for a delta's patches (`encode`), and
    what the call becomes (`mix`).

    Args:
        site: all of a tensor, or a call.
        patch: what the method that makes room would place there, on the meta device.
        max_rank: the bank's.
    """

    site: Site
    address: str
    number: int

    at_call: ClassVar[bool] = False
    """Whether it sits at the call of the module whose tensor it changes."""
    learned: ClassVar[tuple[str, ...]] = ()
    """The tables that `bank.train` trains."""
    trained: ClassVar[tuple[type[Patch], ...]] = ()
    """The patches whose parameters those are, and nothing else of them."""
    narrows: ClassVar[bool] = False
    """Whether its tables may be as narrow as the widest of what a batch has in them."""
    template: Any
    """The patch that room was made by."""

    def __init__(self, site: Site, patch: Patch, max_rank: int):
        super().__init__()
        self.suits(site)
        self.site, self.address = site, site.address
        self.slot: str = CALL if self.at_call else site.slot
        self.__dict__["template"] = patch  # no part of the model
        self.dtype: torch.dtype = dtype_of(site, patch)
        self.router: Router
        self.arena: Arena
        self.number = -1  # among the sites of the arena
        self.tables: Tables = {}
        self._contents: dict[int, tuple[int, dict[str, Any]]] = {}

    @staticmethod
    def suits(site: Site) -> None:
        """Raises TargetError if rows can't be told apart at a site."""

    def fields(self) -> dict[str, Field]:
        """What each slot holds, by name."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """How much room it makes; of two alike at one site the larger one is planted."""
        return sum(field.num_bytes for field in self.fields().values())

    def encode(self, patches: Sequence[Patch]) -> Contents:
        """A slot's contents for the patches that a delta has here, nearly always one.

        A tensor smaller than its field fills the first entries. In training, where `trains` says
        no, its gradients go to the patches' parameters.
        Raises PeftliteError if a patch has no room.
        """
        raise NotImplementedError

    def mix(self, rows: Rows, tables: Tables, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """The call, each row of its first argument changed by the contents of its slot.

        `tables` are the slots' own, or in training such as have gradients.
        """
        raise NotImplementedError

    def decode(self, patches: Sequence[Any], contents: Mapping[str, Tensor]) -> None:
        """Gives patches a slot's contents: the way back from `encode`. Raises PeftliteError."""
        if not self.trains(patches):
            raise self.cannot("be read back out of a bank", patches[0])
        for name, value in self.used(contents).items():
            self.parameter(patches[0], name).data.copy_(value)

    def trains(self, patches: Sequence[Any]) -> bool:
        """Whether the learned tables, as `used` cuts them, are all that these patches are."""
        return type(patches[0]) in self.trained and is_whole(patches)

    def learns(self, patch: Any) -> Sequence[str]:
        """The tables that a patch trains."""
        return self.learned

    def dropout(self, patch: Any) -> float:
        """The probability by which a patch drops inputs in training: `mix` has it in its tables."""
        return 0.0

    def parameter(self, patch: Any, name: str) -> Tensor:
        """What is learned of a patch, by the name of its table."""
        return getattr(patch, name)

    def used(self, contents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is learned of a slot's contents, without the padding."""
        return {name: contents[name] for name in self.learned}

    def call(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        inputs = (*args, *kwargs.values()) if kwargs else args
        x = next((t for t in inputs if isinstance(t, Tensor) and t.dim()), None)
        rows = None if x is None else self.router.rows(x)
        if rows is None:
            return inner(*args, **kwargs)
        tables = self.tables if rows.tables is None else rows.tables(self)
        if torch.compiler.is_compiling() and self.router.trains and torch.is_grad_enabled():
            rows, tables = learned(self.tables, rows, self.router, self.number)
        return self.mix(rows, tables, inner, *args, **kwargs)

    def by_runs(self, rows: Rows, tables: Tables, *tensors: Tensor) -> bool:
        """Whether to go by what the host knows: on a CPU, with nothing to be differentiated."""
        if rows.runs is None or tables is not self.tables or not tensors[0].is_cpu:
            return False
        return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))

    def contents_of(self, slot: int) -> dict[str, Any]:
        """A slot's contents as they are used, scalars as numbers; kept until it's filled anew."""
        fills, kept = self.arena.fills[slot], self._contents.get(slot)
        if kept is None or kept[0] != fills:
            full = {name: table[slot] for name, table in self.tables.items()}
            numbers = {name: value.item() for name, value in full.items() if not value.dim()}
            kept = self._contents[slot] = (fills, {**full, **self.used(full), **numbers})
        return kept[1]

    def settle(self, arena: Arena, router: Router, number: int) -> None:
        """Takes its place in a bank's memory."""
        self.arena, self.router, self.number = arena, router, number
        self.tables = arena.tables(number)

    def saved(self) -> dict[str, Tensor]:
        raise PeftliteError("a bank isn't a delta: save each with bank.save(name, path)")

    def __deepcopy__(self, memo: Any) -> Any:
        raise _no_copy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _no_copy()

    def cannot(self, what: str, patch: Patch) -> PeftliteError:
        return PeftliteError(f"{self.address}: a {type(patch).__name__} can't {what}")

    def too_large(self, what: str, room: Any, setting: str) -> PeftliteError:
        return PeftliteError(
            f"{self.address}: {what} the room for {room} that the bank's methods make: give them a "
            f"larger {setting}"
        )


def _no_copy() -> PeftliteError:
    return PeftliteError(
        "a model with a bank can't be copied, pickled or viewed, for the bank's memory is one: "
        "bank.close() first, or copy the model before"
    )


def dtype_of(site: Site, patch: Any) -> torch.dtype:
    """What a slot keeps a patch's matrices in: as its method says, or as its site computes."""
    said = getattr(getattr(patch, "method", None), "dtype", None)
    if said is not None or not site.is_call:
        return said or site.tensor.dtype
    floats = (p.dtype for p in site.module.parameters() if p.is_floating_point())
    return next(floats, torch.get_default_dtype())


def put(fields: Mapping[str, Tensor], slot: Any, contents: Contents) -> None:
    """Writes contents to where a slot has them, which no gradient is of."""
    for name, value in contents.items():
        field = fields[name].data[slot]
        if isinstance(value, Tensor):
            field[tuple(map(slice, value.shape))].copy_(value.data)
        else:
            field.fill_(value)


def is_whole(patches: Sequence[Any]) -> bool:
    """Whether patches are one, on all of a tensor."""
    return len(patches) == 1 and patches[0].index is None
