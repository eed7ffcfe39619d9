"""plan: what attach would do, looked at before anything is touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from peftlite.core.assign import Placed, assign, methods_in
from peftlite.core.attach import base_parameters, deltas
from peftlite.core.delta import Delta
from peftlite.core.patch import Method
from peftlite.core.site import walk
from peftlite.core.tensors import bytes_in
from peftlite.quant.holder import numbers
from peftlite.table import Shown, listed, size
from peftlite.verbs.quantize import saved


@dataclass(repr=False)
class Plan(Shown):
    """What `attach` would do; printing it shows a table.

    Attributes:
        delta: what would be attached, on the meta device.
        base_parameters: the size of the model.
        base_bytes: what its tensors take, packed ones as they are.
        packed_bytes: what they would take after `pl.quantize(model)`.
    """

    delta: Delta
    base_parameters: int
    base_bytes: int
    packed_bytes: int

    @property
    def addresses(self) -> list[str]:
        """The sites that would have a patch."""
        return list(self.delta.placed)

    @property
    def num_parameters(self) -> int:
        """How many numbers would be trained."""
        return self.delta.num_parameters

    @property
    def num_bytes(self) -> int:
        """What a file of the delta would hold."""
        return self.delta.num_bytes

    @property
    def optimizer_bytes(self) -> int:
        """What AdamW keeps of what is trained: two numbers for each."""
        return 2 * sum(p.nbytes for p in self.delta.parameters())

    @property
    def larger(self) -> list[str]:
        """The tensors that have fewer numbers than their patches would train."""
        return [
            address
            for address, placed in self.delta.placed.items()
            if not placed.site.is_call
            and sum(map(torch.numel, placed.patch.parameters())) > placed.site.shape.numel()
        ]

    def __len__(self) -> int:
        return len(self.delta.placed)

    def _summary(self) -> str:
        return self.delta.total()

    def _memory(self) -> str:
        would = f" ({size(self.packed_bytes)} after pl.quantize)"
        would = would if self.packed_bytes < self.base_bytes else ""
        gradients, adamw = size(self.optimizer_bytes // 2), size(self.optimizer_bytes)
        return f"base {size(self.base_bytes)}{would}, gradients {gradients}, AdamW {adamw}"

    def _lines(self) -> Iterator[str]:
        share = self.num_parameters / max(self.base_parameters, 1)
        yield self.delta.table()
        yield f"{self.delta.total()} ({share:.3%} of the base's {self.base_parameters:,})"
        yield f"memory: {self._memory()}"
        if larger := self.larger:
            yield (
                f"larger than the tensors that they change are {len(larger)} of {len(self)} "
                f"patches: {listed(larger)}; a lower rank would do, or pl.FullTuning"
            )


def plan(model: nn.Module, method: Method | Sequence[Method]) -> Plan:
    """What `attach` would do: the sites, counts and bytes. Changes nothing. Raises TargetError.

    Example:
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        print(pl.plan(model, [pl.LoRA(rank=2), pl.BitFit()]))
    """
    methods = methods_in(method)
    placed = [
        item
        for how, sites in assign(model, methods)
        for item in Placed.all([replace(site, on="meta") for site in sites], how)
    ]
    base = base_parameters(model, deltas(model).values())
    held = {
        id(t): bytes_in(t)
        for _, module in walk(model)
        for t in (*module._parameters.values(), *module._buffers.values())
        if t is not None
    }
    count, now = numbers(model, (p for _, p in base)), sum(held.values())
    return Plan(Delta("plan", methods, placed), count, now, now - saved(model))
