"""Codec: a delta as a row of bytes, such as a slot holds, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from peftlite.bank.arena import Row
from peftlite.bank.entry import Entry
from peftlite.bank.room import Room
from peftlite.core.delta import Delta


@torch.no_grad()
def encode(room: Room, delta: Delta) -> Row:
    """A delta as a slot holds it. Raises PeftliteError if there is no room for it."""
    row = room.arena.blank()
    for mixed, patches in room.by_mixed(delta.placed.values()):
        fields = room.arena.fields(row, mixed.number)
        for name, value in mixed.encode(patches).items():
            if isinstance(value, Tensor):
                fields[name][tuple(map(slice, value.shape))].copy_(value)
            else:
                fields[name].fill_(value)
    return row


@torch.no_grad()
def decode(room: Room, entry: Entry, row: Row) -> Delta:
    """A delta from what a slot holds of it. Raises PeftliteError if it can't be had back."""
    placed = entry.placed()
    for mixed, patches in room.by_mixed(placed):
        mixed.decode(patches, room.arena.fields(row, mixed.number))
    return Delta(entry.name, [method for method, _ in entry.built_by], placed)
