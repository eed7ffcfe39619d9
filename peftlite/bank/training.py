"""Training in a bank: many deltas learn in one batch, each by what its slot holds.

Where a slot holds a patch's parameters, they live there. Where it holds what is made of them, as of
a DoRA's, that is made anew for each forward pass, and gradients go back through it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.bank.families.mixed import Contents, Mixed, put
from peftlite.bank.rows import Rows, Tables, side_by_side
from peftlite.core.patch import Patch
from peftlite.errors import PeftliteError


class Leaves:
    """The parameters of a delta in training: views of what its slot holds, as far as it's used.

    Args:
        groups: what mixes its patches, and the patches.
        own: whether they are the patches' own parameters, which live in the slot from now on, or
            have its contents made of them.
    """

    def __init__(
        self, groups: Iterable[tuple[Mixed, Sequence[Patch]]], slot: int, own: bool = False
    ):
        self._slot = slot
        self.named: dict[str, nn.Parameter] = {}
        self.dropout: dict[Mixed, float] = {}
        self.shapes: dict[tuple[Mixed, str], torch.Size] = {}
        self._leaves: dict[tuple[Mixed, str], nn.Parameter] = {}
        self._made: dict[Mixed, Sequence[Patch]] = {}
        self._mixed: dict[int, Mixed] = {}
        self._dropping: list[Mixed] = []
        for mixed, patches in groups:
            self._mixed[mixed.number] = mixed
            self._dropping += [mixed for p in patches if getattr(p, "dropout", 0.0)]
            if not mixed.trains(patches):
                self._make(mixed, patches, own)
                continue
            _check(mixed)
            patch, contents = patches[0], {n: table[slot] for n, table in mixed.tables.items()}
            self.dropout[mixed] = mixed.dropout(patch)
            for name, used in mixed.used(contents).items():
                self.shapes[mixed, name] = used.shape
                if name in mixed.learns(patch):
                    leaf = _moved(mixed, patch, name, used) if own else nn.Parameter(used)
                    self._leaves[mixed, name] = self.named[f"{mixed.address}:{name}"] = leaf

    def _make(self, mixed: Mixed, patches: Sequence[Patch], own: bool) -> None:
        """Has a slot's contents made of patches. Raises PeftliteError unless all of them shows."""
        if not (own and _shows(mixed, patches)):
            raise mixed.cannot(
                "be trained in a bank, where it isn't the parameters alone", patches[0]
            )
        self._made[mixed], self.dropout[mixed] = patches, mixed.dropout(patches[0])
        for i, patch in enumerate(patches):
            part = f"{mixed.address}:" + f"{i}." * (i > 0)
            self.named.update({part + name: p for name, p in patch.named_parameters()})

    @property
    def is_made(self) -> bool:
        """Whether some of a slot's contents has to be made anew whenever it is read."""
        return bool(self._made)

    def contents(self, mixed: Mixed) -> Contents:
        """What a slot holds, where it is made of parameters, with gradients to them."""
        return mixed.encode(self._made[mixed]) if mixed in self._made else {}

    @torch.no_grad()
    def fill(self) -> None:
        """Brings what is made of parameters to where they are."""
        for mixed in self._made:
            put(mixed.tables, self._slot, self.contents(mixed))

    def of(self, mixed: Mixed, name: str) -> nn.Parameter | None:
        """What is learned of a table's row; None if the table is fixed, or has no row of it."""
        return self._leaves.get((mixed, name))

    def _value(self, mixed: Mixed, name: str) -> Any:
        leaf = self.of(mixed, name)
        return self.contents(mixed).get(name) if leaf is None else leaf

    @property
    def drops(self) -> bool:
        """Whether inputs are dropped now."""
        return any(mixed.training for mixed in self._dropping)

    def learn(self, number: int, name: str, gradient: Tensor) -> None:
        """Adds the gradient of what a slot holds at a site to that of what is learned of it."""
        mixed = self._mixed.get(number)
        with torch.enable_grad():
            value = None if mixed is None else self._value(mixed, name)
        if isinstance(value, Tensor) and value.requires_grad:
            cut = gradient[tuple(map(slice, value.shape))]
            torch.autograd.backward(value, cut.to(value.device, value.dtype))

    def leave(self) -> None:
        """Leaves the slot: what an optimizer writes from now on changes no delta."""
        for leaf in self._leaves.values():
            leaf.data = leaf.data.clone()


def _moved(mixed: Mixed, patch: Patch, name: str, used: Tensor) -> nn.Parameter:
    """A patch's own parameter, on a slot's memory. Raises PeftliteError."""
    leaf = mixed.parameter(patch, name)
    if not isinstance(leaf, nn.Parameter) or (leaf.shape, leaf.dtype) != (used.shape, used.dtype):
        raise mixed.cannot("be trained in a bank, where it isn't the parameters alone", patch)
    leaf.data = used
    return leaf


def _shows(mixed: Mixed, patches: Sequence[Patch]) -> bool:
    """Whether a slot's contents, as they are made of patches, depend on all that these learn."""
    learned = [p for patch in patches for p in patch.parameters() if p.requires_grad]
    with torch.enable_grad():
        made = mixed.encode(patches).values()
        sums = [v.sum() for v in made if isinstance(v, Tensor) and v.requires_grad]
        found = torch.autograd.grad(sums, learned, allow_unused=True) if sums else ()
    return len(found) == len(learned) and all(gradient is not None for gradient in found)


def _check(mixed: Mixed) -> None:
    """Raises PeftliteError if a slot is too coarse for what it learns."""
    half = {mixed.tables[name].dtype for name in mixed.learned if mixed.tables[name].itemsize < 4}
    if half:
        raise PeftliteError(
            f"{mixed.address} has slots in {half.pop()}, where small steps are lost: make room in "
            "fp32, as methods=pl.LoRA(dtype=torch.float32)"
        )


def training_rows(numbers: Sequence[int], leaves: Mapping[int, Leaves], repeat: int = 1) -> Rows:
    """Rows of these slots, whose tables are made of the leaves of each; 0 is the base.

    Where each slot has its rows side by side, as many as the others, a table lies as the batch
    does, and nothing of it is copied.
    """
    runs = [(slot, len([*run])) for slot, run in itertools.groupby(numbers)]
    lies = len({slot for slot, _ in runs}) == len(runs) and len({size for _, size in runs}) == 1
    lies &= repeat == 1
    distinct = [slot for slot, _ in runs] if lies else sorted(set(numbers))
    there = side_by_side(distinct) or distinct

    def tables(mixed: Any) -> Tables:
        contents = [leaves[slot].contents(mixed) if slot in leaves else {} for slot in distinct]
        for slot, own in zip(distinct, contents, strict=True):
            put(mixed.tables, slot, own)
        made = {name: rows(mixed, name, table, contents) for name, table in mixed.tables.items()}
        drops = [leaves[slot].dropout.get(mixed, 0.0) if slot in leaves else 0 for slot in distinct]
        if any(drops):
            made["dropout"] = torch.tensor(drops, device=made["scale"].device)
        return made

    def rows(mixed: Mixed, name: str, table: Tensor, contents: Sequence[Contents]) -> Tensor:
        made = (each.get(name) for each in contents)
        own = [v.to(table.device) if isinstance(v, Tensor) else None for v in made]
        if mixed.narrows:
            found = [leaves[slot].shapes.get((mixed, name)) for slot in distinct if slot in leaves]
            found += [value.shape for value in own if value is not None]
            widest = [max(sizes) for sizes in zip(*filter(None, found), strict=True)]
            table = table[(slice(None), *map(slice, widest))]
        for i, slot in enumerate(distinct):
            if slot in leaves and own[i] is None:
                own[i] = leaves[slot].of(mixed, name)
        learned = {i: leaf for i, leaf in enumerate(own) if leaf is not None and leaf.requires_grad}
        if not learned:
            return table[there]
        return Learned.apply(table, there, [*learned], *learned.values())

    index = range(len(distinct)) if lies else [distinct.index(n) for n in numbers]
    repeat = runs[0][1] if lies else repeat
    given, slots = (torch.tensor(each, device="cpu") for each in (numbers, index))
    return Rows(slots, tables=tables, repeat=repeat, lies=lies, numbers=given)


class Learned(torch.autograd.Function):
    """The rows of a table, in which leaves live: each has the gradient of its row, unpadded."""

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, there: Any, places: list[int], *leaves: nn.Parameter
    ) -> Tensor:
        ctx.places, ctx.shapes = places, [leaf.shape for leaf in leaves]
        return table[there]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows = grad_outputs[0].unbind()
        own = (rows[i] for i in ctx.places)
        cut = zip(own, ctx.shapes, strict=True)
        return (
            None,
            None,
            None,
            *(row if row.shape == shape else row[tuple(map(slice, shape))] for row, shape in cut),
        )
