"""Training in a bank: parameters that share a slot's memory, so many deltas learn in one batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.bank.families.mixed import Mixed
from peftlite.bank.rows import Rows, Tables, side_by_side
from peftlite.core.patch import Patch
from peftlite.errors import PeftliteError


class Leaves:
    """The parameters of a delta in training: views of what its slot holds, as far as it's used.

    Args:
        groups: what mixes its patches, and the patches.
        own: whether they are the patches' own parameters, which live in the slot from now on.
    """

    def __init__(
        self, groups: Iterable[tuple[Mixed, Sequence[Patch]]], slot: int, own: bool = False
    ):
        self.named: dict[str, nn.Parameter] = {}
        self.dropout: dict[Mixed, float] = {}
        self.shapes: dict[tuple[Mixed, str], torch.Size] = {}
        self._leaves: dict[tuple[Mixed, str], nn.Parameter] = {}
        for mixed, patches in groups:
            _check(mixed, patches)
            patch, contents = patches[0], {n: table[slot] for n, table in mixed.tables.items()}
            self.dropout[mixed] = mixed.dropout(patch)
            for name, used in mixed.used(contents).items():
                self.shapes[mixed, name] = used.shape
                if name in mixed.learns(patch):
                    leaf = _moved(mixed, patch, name, used) if own else nn.Parameter(used)
                    self._leaves[mixed, name] = self.named[f"{mixed.address}:{name}"] = leaf

    def of(self, mixed: Mixed, name: str) -> nn.Parameter | None:
        """What is learned of a table's row; None if the table is fixed, or has no row of it."""
        return self._leaves.get((mixed, name))

    def leave(self) -> None:
        """Leaves the slot: what an optimizer writes from now on changes no delta."""
        for leaf in self.named.values():
            leaf.data = leaf.data.clone()


def _moved(mixed: Mixed, patch: Patch, name: str, used: Tensor) -> nn.Parameter:
    """A patch's own parameter, on a slot's memory. Raises PeftliteError."""
    leaf = mixed.parameter(patch, name)
    if not isinstance(leaf, nn.Parameter) or (leaf.shape, leaf.dtype) != (used.shape, used.dtype):
        raise mixed.cannot("be trained in a bank, where it isn't the parameters alone", patch)
    leaf.data = used
    return leaf


def _check(mixed: Mixed, patches: Sequence[Patch]) -> None:
    """Raises PeftliteError unless training the tables is training these patches."""
    if not mixed.trains(patches):
        raise mixed.cannot("be trained in a bank, where it isn't the parameters alone", patches[0])
    half = {mixed.tables[name].dtype for name in mixed.learned if mixed.tables[name].itemsize < 4}
    if half:
        raise PeftliteError(
            f"{mixed.address} has slots in {half.pop()}, where small steps are lost: make room in "
            "fp32, as methods=pl.LoRA(dtype=torch.float32)"
        )


def training_rows(numbers: Sequence[int], leaves: Mapping[int, Leaves]) -> Rows:
    """Rows of these slots, whose tables are made of the leaves of each; 0 is the base.

    Where each slot has its rows side by side, as many as the others, a table lies as the batch
    does, and nothing of it is copied.
    """
    runs = [(slot, len([*run])) for slot, run in itertools.groupby(numbers)]
    lies = len({slot for slot, _ in runs}) == len(runs) and len({size for _, size in runs}) == 1
    distinct = [slot for slot, _ in runs] if lies else sorted(set(numbers))
    there = side_by_side(distinct) or distinct

    def tables(mixed: Any) -> Tables:
        made = {name: rows(mixed, name, table) for name, table in mixed.tables.items()}
        drops = [leaves[slot].dropout.get(mixed, 0.0) if slot in leaves else 0 for slot in distinct]
        if any(drops):
            made["dropout"] = torch.tensor(drops, device=made["scale"].device)
        return made

    def rows(mixed: Mixed, name: str, table: Tensor) -> Tensor:
        if mixed.narrows:
            found = (leaves[slot].shapes.get((mixed, name)) for slot in distinct if slot in leaves)
            widest = [max(sizes) for sizes in zip(*filter(None, found), strict=True)]
            table = table[(slice(None), *map(slice, widest))]
        own = [leaves[slot].of(mixed, name) if slot in leaves else None for slot in distinct]
        learned = {i: leaf for i, leaf in enumerate(own) if leaf is not None}
        if not learned:
            return table[there]
        return Learned.apply(table, there, [*learned], *learned.values())

    if lies:
        back = torch.arange(len(distinct), device="cpu")
        return Rows(back, tables=tables, repeat=runs[0][1], lies=True)
    return Rows(torch.tensor([distinct.index(n) for n in numbers], device="cpu"), tables=tables)


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
