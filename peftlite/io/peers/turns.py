"""Turns: LyCORIS's rotations of a layer's outputs, and its scales of them or of inputs, both ways.

It turns each block by Rᵀ, and by R in a butterfly, with R = (I + N)(I − N)⁻¹ and N = Q − Qᵀ: ours
of N, and of −N. Its butterfly has the halves of a block one in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from peftlite.core.assign import Placed
from peftlite.core.patch import Method
from peftlite.core.tensors import wide
from peftlite.io.files import Tensors
from peftlite.io.peers.products import Get, Recipe
from peftlite.methods.boft import BOFT
from peftlite.methods.ia3 import IA3
from peftlite.methods.oft import OFT, skew

Keys: TypeAlias = Mapping[str, str]
Read: TypeAlias = "tuple[Method, dict[str, Recipe]] | None"

ALPHA, BLOCKS, RESCALE = "alpha", "oft_blocks", "rescale"
INPUTS, SCALE = "on_input", "weight"


def read_rotation(keys: Keys, file: Tensors) -> Read:
    """A rotation, behind which outputs may be scaled; None if it is of one number."""
    if ALPHA not in keys:
        raise ValueError("it has no alpha, which bounds its rotation")
    *factors, count, k, _ = file.entries[keys[BLOCKS]].shape
    bound = file.get(keys[ALPHA]).item() * count * k

    def q(get: Get) -> Tensor:
        x = get(keys[BLOCKS])
        x = x.to(wide(x))
        n = x - x.mT
        if bound > 0:
            n = n * (bound / (n.norm() + 1e-8)).clamp(max=1)
        if factors:
            n = -n[..., _halves(k), :][..., _halves(k)]
        row, column = torch.triu_indices(k, k, 1, device=n.device)
        return n[..., row, column]

    def s(get: Get) -> Tensor:
        blocks = get(keys[BLOCKS])
        return get(keys[RESCALE]).flatten() if RESCALE in keys else blocks.new_ones(count * k)

    if factors:
        return BOFT(block_size=k, m=factors[0], outputs=True), {"q": q, "s": s}
    if k == 1:
        return (IA3(), {"l": s}) if RESCALE in keys else None
    if RESCALE in keys:
        return BOFT(block_size=k, m=1, outputs=True), {"q": lambda get: q(get)[None], "s": s}
    return OFT(block_size=k, outputs=True), {"q": q}


def read_scales(keys: Keys, file: Tensors) -> Read:
    """(IA)³, less 1."""

    def scales(get: Get) -> Tensor:
        x = get(keys[SCALE]).flatten()
        return x.to(wide(x)) + 1

    return IA3(feedforward=bool(file.get(keys[INPUTS]).item())), {"l": scales}


def write_rotation(item: Placed) -> dict[str, Tensor]:
    """Raises ValueError where LyCORIS has no such rotation."""
    method, patch = cast(Any, item.method), cast(Any, item.patch)
    bounded = isinstance(method, OFT) and (method.neumann_terms or method.eps)
    if bounded or not method.outputs:
        raise ValueError("there a rotation is of outputs, exact, and without a bound")
    m = method.m if isinstance(method, BOFT) else 1
    k, count, n = patch.block, patch.q.shape[-2], skew(patch.q.detach(), patch.block)
    if isinstance(method, BOFT) and count == 2 ** (m - 1) and k % 2 == 0:
        back = _halves(k).argsort()
        n = -n[..., back, :][..., back]
    elif m > 1 or k > count:
        raise ValueError(
            f"there {count} blocks of {k} are of {count.bit_length()} factors if they are 2ⁿ, and "
            "blocks of one factor are no larger than their number"
        )
    else:
        n = n.reshape(count, k, k)
    found = {BLOCKS: n.triu(), ALPHA: torch.tensor(0.0)}
    if isinstance(method, BOFT) and (patch.s != 1).any():
        found[RESCALE] = patch.s.detach().view(-1, *(1 for _ in item.site.whole.shape[1:]))
    return found


def write_scales(item: Placed) -> dict[str, Tensor]:
    patch, ones = cast(Any, item.patch), [1 for _ in item.site.whole.shape[2:]]
    x = patch.l.detach() - 1
    return {SCALE: x.view(1, -1, *ones) if ones else x, INPUTS: torch.tensor(int(patch.inputs))}


def _halves(k: int) -> Tensor:
    """Where LyCORIS has each entry of a block's two halves, which are one after the other here."""
    return torch.arange(k).view(-1, 2).T.flatten()


@dataclass(frozen=True)
class Turn:
    """What isn't a product of factors.

    Args:
        mark: the name of a tensor that it has, and nothing else.
        others: what else it may have.
        read: a method and what makes its tensors, or None where it changes nothing.
        write: its tensors, by their names.
    """

    mark: str
    others: tuple[str, ...]
    read: Callable[[Keys, Tensors], Read]
    write: Callable[[Placed], dict[str, Tensor]]


_ROTATION = Turn(BLOCKS, (RESCALE, ALPHA), read_rotation, write_rotation)
TURNS: Mapping[type[Method], Turn] = {
    OFT: _ROTATION,
    BOFT: _ROTATION,
    IA3: Turn(INPUTS, (SCALE,), read_scales, write_scales),
}
