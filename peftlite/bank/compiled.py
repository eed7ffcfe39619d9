"""Compiled: tables of compiled code that trains, whose gradients go to where a slot has its own.

A graph has no parameters of the deltas that it trains: it asks for each row's contents by number,
and gives their gradients back by number, so that other deltas in the batch are the same graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftlite.bank.route import routers
from peftlite.bank.rows import Rows, Tables
from peftlite.kernels.ops import op


def learned(tables: Tables, rows: Rows, router: Any, site: int) -> tuple[Rows, Tables]:
    """A table's row for each of these, with gradients; and the rows that take them in turn."""
    own = {}
    for name, table in tables.items():
        given = table, router.anchor, rows.slots, router.number, site, name
        is_float = table.is_floating_point()
        taken = torch.ops.peftlite.learned_rows(*given) if is_float else table[rows.slots]
        own[name] = taken
    return Rows(torch.arange(len(rows.slots), device=rows.slots.device), lies=True), own


@op(
    "learned_rows(Tensor table, Tensor anchor, Tensor slots, int router, int site, str name) "
    "-> Tensor",
    fake=lambda table, _, slots, *__: table.new_empty((len(slots), *table.shape[1:])),
)
def _learned_rows(table: Tensor, anchor: Tensor, slots: Tensor, *_: Any) -> Tensor:
    return table.index_select(0, slots).contiguous()


@op(
    "learn_rows(Tensor grad, Tensor slots, int router, int site, str name) -> Tensor",
    fake=lambda grad, *_: grad.new_empty((), dtype=torch.float32, device="cpu"),
)
def _learn_rows(grad: Tensor, slots: Tensor, router: int, site: int, name: str) -> Tensor:
    """Adds the gradients of rows to what their slots learn; gives the anchor's, which is 0."""
    for slot in slots.unique().tolist():
        leaves = routers[router].leaves.get(slot)
        if leaves is not None:
            leaves.learn(site, name, grad[slots == slot].sum(0))
    return torch.zeros((), device="cpu")


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, slots, *ctx.where = inputs
    ctx.save_for_backward(slots)


def _back(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (slots,) = ctx.saved_tensors
    anchors = torch.ops.peftlite.learn_rows(grad.contiguous(), slots, *ctx.where)
    return None, anchors, None, None, None, None


torch.library.register_autograd("peftlite::learned_rows", _back, setup_context=_keep)
