"""Call: a call of a model, and whether several are one: their rows one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

MASK = "attention_mask"
PADDED = ("input_ids", "token_type_ids", "position_ids", MASK)
"""Arguments (b, t) that may be made longer at the right, where a mask says so."""


KINDS = ("cpu", "cuda", "xpu", "mps")
"""Of devices, each of which may have its autocast."""


class How(NamedTuple):
    """What torch, and the model, are in where a call is made."""

    gradients: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    training: bool

    @classmethod
    def now(cls, training: bool) -> How:
        kinds = [kind for kind in KINDS if torch.is_autocast_enabled(kind)]
        autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)
        gradients = torch.is_grad_enabled()
        return cls(gradients, torch.is_inference_mode_enabled(), autocast, training)

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same, elsewhere."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            for kind, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            yield


class Call:
    """A call, its arguments as leaves.

    Args:
        changed: whether the model is to have the caller's delta, and not be as the base is.

    Attributes:
        rows: of its batch; None if no argument has any.
        size: how many numbers its tensors have.
        tokens: of a row, where a mask says which of them count.
    """

    how: How
    changed: bool
    leaves: list[Any]
    spec: pytree.TreeSpec

    def __init__(
        self, how: How, changed: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.how, self.changed = how, changed
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        tensors = [t for t in self.leaves if isinstance(t, Tensor) and t.dim()]
        batch = next((t for t in tensors if t.dim() > 1), tensors[0] if tensors else None)
        self.rows: int | None = None if batch is None else len(batch)
        self.size: int = sum(t.numel() for t in tensors)
        mask = kwargs.get(MASK)
        self.tokens: int | None = None
        longer: list[int] = []
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self.tokens = mask.shape[1]
            longer += map(id, args[:1])  # ids, as the losses give them
        longer += [id(kwargs[name]) for name in PADDED if name in kwargs]
        shape = (self.rows, self.tokens)
        self._padded = [
            id(leaf) in longer and isinstance(leaf, Tensor) and leaf.shape == shape
            for leaf in self.leaves
        ]

    def fits(self, other: Call) -> bool:
        """Whether the two may be one call."""
        if self.how != other.how or self.spec != other.spec or None in (self.rows, other.rows):
            return False
        pairs = zip(self.leaves, other.leaves, self._padded, other._padded, strict=True)
        return all(self._alike(other, *pair) for pair in pairs)

    def _alike(self, other: Call, own: Any, its: Any, padded: bool, also: bool) -> bool:
        if isinstance(own, Tensor) and isinstance(its, Tensor) and own.dim() and its.dim():
            if (own.dtype, own.device, padded) != (its.dtype, its.device, also):
                return False
            if len(own) == self.rows and len(its) == other.rows:
                return padded or own.shape[1:] == its.shape[1:]
        plain = isinstance(own, bool | int | float | str)
        return own is its or (plain and type(own) is type(its) and own == its)


def joined(calls: Sequence[Call]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of calls that fit, as those of one."""
    first, longest = calls[0], max(call.tokens or 0 for call in calls)
    leaves = []
    for parts in zip(*(_parts(call, longest) for call in calls), strict=True):
        rows = isinstance(parts[0], Tensor) and parts[0].dim() and len(parts[0]) == first.rows
        leaves.append(torch.cat(parts) if rows else parts[0])
    return pytree.tree_unflatten(leaves, first.spec)


def _parts(call: Call, longest: int) -> Iterator[Any]:
    for leaf, padded in zip(call.leaves, call._padded, strict=True):
        yield F.pad(leaf, (0, longest - leaf.shape[1])) if padded else leaf


def parted(calls: Sequence[Call], output: Any) -> list[Any] | None:
    """What each call has of the output of all; None where it can't be told apart."""
    counts = [call.rows or 0 for call in calls]
    longest = max(call.tokens or 0 for call in calls)
    leaves, spec = pytree.tree_flatten(output)
    parts: list[Sequence[Any]] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == sum(counts):
            own = leaf.split(counts)
            parts.append([_cut(part, call, longest) for part, call in zip(own, calls, strict=True)])
        elif leaf is None or isinstance(leaf, bool | int | float | str):
            parts.append([leaf] * len(calls))
        else:
            return None
    return [pytree.tree_unflatten(own, spec) for own in zip(*parts, strict=True)]


def _cut(part: Tensor, call: Call, longest: int) -> Tensor:
    """Without the tokens that were added at the right."""
    if call.tokens in (None, longest) or part.dim() < 2 or part.shape[1] != longest:
        return part
    return part[:, : call.tokens]
