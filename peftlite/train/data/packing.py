"""Packing: several examples in one block, and the mask that keeps them from seeing one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from peftlite.errors import PeftliteError

IGNORED = -100  # the label of a token that isn't learned


def fill(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which sizes share a block, by first-fit decreasing: at most 11/9 of the fewest, and one.

    Raises PeftliteError for a size above a block's length.
    """
    if too_long := [i for i, size in enumerate(sizes) if size > length]:
        raise PeftliteError(
            f"example {too_long[0]} has {sizes[too_long[0]]} tokens, and a block {length}: read "
            f"the data with max_length={length}, or pack longer blocks"
        )
    blocks: list[list[int]] = [[] for _ in sizes]
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    room = [length] * 2 * leaves  # a binary tree: the most room in any block below a node
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        node = 1
        while node < leaves:
            node = 2 * node + (room[2 * node] < sizes[i])
        blocks[node - leaves].append(i)
        room[node] -= sizes[i]
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [sorted(block) for block in blocks if block]


@dataclass(eq=False, repr=False)
class Blocks(Sequence[dict[str, Tensor]]):
    """Packed examples: their tensors end to end, and `position_ids` that start at 0 in each.

    Attributes:
        data: the examples.
        lengths: of each example, in tokens.
        blocks: the indices of the examples in each block.
        length: of a block, in tokens, at most.
    """

    data: Sequence[Mapping[str, Tensor]]
    lengths: Sequence[int]
    blocks: Sequence[Sequence[int]]
    length: int

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return replace(self, blocks=self.blocks[i])
        return join([self.data[j] for j in self.blocks[i]])

    def __repr__(self) -> str:
        return f"Blocks({len(self)} of {self.length} tokens, {self.efficiency:.1%} full)"

    @property
    def efficiency(self) -> float:
        """The share of the blocks' tokens that are examples'; the rest is padding."""
        used = sum(self.lengths[j] for block in self.blocks for j in block)
        return used / (len(self) * self.length)

    def order(self, generator: Generator | None = None) -> list[int]:
        """The order of an epoch, shuffled: indices of blocks."""
        return torch.randperm(len(self), generator=generator).tolist()


def join(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Examples as one: their tensors end to end, each example's first token never a label."""
    for example in examples:
        if odd := [key for key in example if not _has_tokens(example, key)]:
            raise PeftliteError(
                f"examples with {odd[0]!r}, which isn't one per token, can't be packed"
            )
    block = {key: torch.cat([example[key] for example in examples]) for key in examples[0]}
    lengths = [len(example["input_ids"]) for example in examples]
    block["position_ids"] = torch.cat([torch.arange(t) for t in lengths])
    if "labels" in block:
        block["labels"][block["position_ids"] == 0] = IGNORED
    return block


def _has_tokens(example: Mapping[str, Any], key: str) -> bool:
    x, ids = example[key], example.get("input_ids")
    return isinstance(x, Tensor) and isinstance(ids, Tensor) and x.shape[:1] == ids.shape[:1]


def block_mask(position_ids: Tensor) -> Tensor:
    """0 where a token may look, at itself and its example's tokens before it, else −∞.

    Args:
        position_ids: (b, t), 0 at the first token of every example.

    Returns:
        The mask (b, 1, t, t) in fp32, to be added to the scores.

    Example:
        mask = pl.data.block_mask(torch.tensor([[0, 1, 0]]))
        assert (mask[0, 0] == 0).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    example = (position_ids == 0).cumsum(-1)
    seen = (example[:, :, None] == example[:, None, :]).tril()
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)[:, None]
