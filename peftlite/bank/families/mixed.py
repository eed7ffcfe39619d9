"""Mixed: the patch that a bank plants at a site, where every row is changed by its own delta."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlite.bank.arena import Arena, Field
from peftlite.bank.route import Router
from peftlite.bank.rows import Rows, Tables
from peftlite.core.patch import Patch
from peftlite.core.site import CALL, Site
from peftlite.errors import PeftliteError, TargetError

Held = dict[str, Tensor | float]
"""What a slot holds at a site, by the names of its fields."""


class Mixed(Patch):
    """The deltas of a bank at one site, for one family of methods.

    A subclass says what a slot holds (`fields`), how a delta's patch is held (`read`), and what the
    call becomes (`mix`). Its tables are `{name: (slots + 1, *shape)}`; slot 0 is the base.

    Args:
        site: all of a tensor, or a call.
        patch: what the method that makes room would place there, on the meta device.
        max_rank: the bank's.
    """

    at_call: ClassVar[bool] = False
    """Whether it sits at the call of the module whose tensor it changes."""
    learned: ClassVar[tuple[str, ...]] = ()
    """The tables that `bank.train` trains."""
    like: Any
    """The patch that room was made by."""

    def __init__(self, site: Site, patch: Patch, max_rank: int):
        super().__init__()
        self.slot, self.address = CALL if self.at_call else site.slot, site.address
        self.__dict__["like"] = patch  # no part of the model
        self.router: Router
        self.arena: Arena
        self.number = -1  # among the sites of the arena
        self.tables: Tables = {}
        self._of_slots: dict[int, tuple[int, dict[str, Any]]] = {}

    def fields(self) -> dict[str, Field]:
        """What each slot holds, by name."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """How much room it makes; of two alike at one site the larger one is planted."""
        return sum(field.num_bytes for field in self.fields().values())

    def read(self, patches: Sequence[Patch]) -> Held:
        """What a slot holds for the patches that a delta has here, nearly always one.

        A tensor smaller than its field fills the first entries. It is called without gradients.
        Raises PeftliteError if a patch can't be held.
        """
        raise NotImplementedError

    def mix(self, rows: Rows, tables: Tables, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """The call, with the rows of its first argument changed each by its slot."""
        raise NotImplementedError

    def restore(self, patches: Sequence[Any], held: Mapping[str, Tensor]) -> None:
        """Gives patches the values that a slot holds: the way back from `read`."""
        if not self.trains(patches):
            raise self.cannot("be read back out of a bank", patches[0])
        for name, value in self.used(held).items():
            self.parameter(patches[0], name).data.copy_(value)

    def trains(self, patches: Sequence[Any]) -> bool:
        """Whether the learned tables, as `used` cuts them, are the parameters of these patches."""
        return False

    def parameter(self, patch: Any, name: str) -> Tensor:
        """What is learned of a patch, by the name of its table."""
        return getattr(patch, name)

    def used(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is learned of a slot's tensors, as `read` cut them."""
        return {name: held[name] for name in self.learned}

    def call(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values()) if kwargs else args
        x = next((t for t in given if isinstance(t, Tensor) and t.dim()), None)
        rows = None if x is None else self.router.rows(x)
        if rows is None:
            return inner(*args, **kwargs)
        tables = self.tables if rows.tables is None else rows.tables(self)
        return self.mix(rows, tables, inner, *args, **kwargs)

    def by_runs(self, rows: Rows, tables: Tables, *tensors: Tensor) -> bool:
        """Whether to go by what the host knows: on a CPU, with nothing to be differentiated."""
        if rows.runs is None or tables is not self.tables or not tensors[0].is_cpu:
            return False
        return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))

    def of_slot(self, slot: int) -> dict[str, Any]:
        """What a slot holds, cut to what is used, with scalars as numbers; kept for its turn."""
        turn, held = self.arena.turns[slot], self._of_slots.get(slot)
        if held is None or held[0] != turn:
            of = {name: table[slot] for name, table in self.tables.items()}
            numbers = {name: value.item() for name, value in of.items() if not value.dim()}
            held = self._of_slots[slot] = (turn, {**of, **self.used(of), **numbers})
        return held[1]

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


def is_whole(patches: Sequence[Any]) -> bool:
    """Whether patches are one, on all of a tensor."""
    return len(patches) == 1 and patches[0].index is None


def called_as_map(site: Site) -> None:
    """Raises TargetError unless the weight at a site is that of a linear map that is called.

    Experts are called with the tokens that were sent to them, out of their rows.
    """
    module: Any = site.module
    read = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    own = "forward" in vars(module) or getattr(vars(module).get("peftlite"), "own_forward", None)
    if not site.rides or read or own or "experts" in site.address.split("."):
        raise TargetError(
            f"{site.address} isn't the weight of a linear map that is called, so its rows can't be "
            "told apart: leave it out of the bank's methods with exclude="
        )
