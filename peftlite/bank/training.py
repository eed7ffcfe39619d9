"""Training in a bank: parameters that share a slot's memory, so many deltas learn in one batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.bank.families.mixed import Mixed
from peftlite.bank.rows import Rows, Tables
from peftlite.core.patch import Patch
from peftlite.errors import PeftliteError


class Leaves:
    """The parameters of a delta in training: views of what its slot holds, as far as it's used."""

    def __init__(self, groups: Iterable[tuple[Mixed, Sequence[Patch]]], slot: int):
        self.named: dict[str, nn.Parameter] = {}
        self._leaves: dict[tuple[Mixed, str], nn.Parameter] = {}
        for mixed, patches in groups:
            _check(mixed, patches)
            contents = {name: table[slot] for name, table in mixed.tables.items()}
            for name, used in mixed.used(contents).items():
                leaf = nn.Parameter(used)
                self._leaves[mixed, name] = self.named[f"{mixed.address}:{name}"] = leaf

    def padded(self, mixed: Mixed, name: str) -> Tensor | None:
        """A parameter with zeros where its table's row has no use; None if the table is fixed."""
        leaf = self._leaves.get((mixed, name))
        if leaf is None:
            return None
        missing = [n - m for n, m in zip(mixed.tables[name].shape[1:], leaf.shape, strict=True)]
        return F.pad(leaf, [m for n in reversed(missing) for m in (0, n)]) if any(missing) else leaf

    def leave(self) -> None:
        """Leaves the slot: what an optimizer writes from now on changes no delta."""
        for leaf in self.named.values():
            leaf.data = leaf.data.clone()


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
    """Rows of these slots, whose tables are made of the leaves of each; 0 is the base."""
    distinct = list(dict.fromkeys(numbers))
    back = torch.tensor([distinct.index(number) for number in numbers], device="cpu")

    def tables(mixed: Any) -> Tables:
        return {name: stack(mixed, name, table) for name, table in mixed.tables.items()}

    def stack(mixed: Mixed, name: str, table: Tensor) -> Tensor:
        rows = [leaves[slot].padded(mixed, name) if slot in leaves else None for slot in distinct]
        parts = zip(distinct, rows, strict=True)
        return torch.stack([table[slot] if row is None else row for slot, row in parts])

    return Rows(back, tables=tables)
