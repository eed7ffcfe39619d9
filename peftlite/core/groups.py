"""Groups: a call made once for each group of its rows, and the outputs put back in order."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from peftlite.core.choice import Choice, NamesByRow
from peftlite.errors import PeftliteError

T = TypeVar("T")
COMMON = ("cache_position",)  # what all rows have in common, however long it is


class Lies(NamedTuple):
    """Where a call has its rows; of a row there may be several entries, side by side.

    Attributes:
        inputs: the dimension of them in a tensor of an argument, by its name; None where it is
            common to all rows.
        outputs: the dimension of them in an output, by its number.
        sizes: how many entries a row may have in an output.
    """

    inputs: Callable[[str, Tensor], int | None]
    outputs: Callable[[int], int] = lambda _: 0
    sizes: Collection[int] = (1,)


def by_rows(
    run: Callable[..., Any],
    choice: Choice,
    rows: NamesByRow,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Runs the rows that share a choice together, and puts the results back in order.

    An argument is split if it is a tensor with one row per entry of `rows`; every tensor that comes
    back must again have one row per row that went in. A cache has no rows of its own: none is
    taken, and none is made unless it is asked for.
    """
    b = len(rows.rows)

    def lies(name: str, x: Tensor) -> int | None:
        return 0 if x.dim() and len(x) == b and name not in COMMON else None

    kwargs = uncached(run, args, kwargs)
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if all(lies("", x) is None for x in tensors):
        raise PeftliteError(
            f"rows= names {b} rows, but no tensor of this call has {b} rows in its first "
            f"dimension; the shapes are {[tuple(x.shape) for x in tensors]}"
        )
    groups: dict[Any, list[int]] = {}
    for i, names in enumerate(rows.rows):
        groups.setdefault(names, []).append(i)
    return in_groups(run, groups, choice.scope, Lies(lies), args, kwargs)


def in_groups(
    run: Callable[..., Any],
    groups: Mapping[T, Sequence[int]],
    scope: Callable[[T], AbstractContextManager[Any]],
    lies: Lies,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    names: Sequence[str] = (),
) -> Any:
    """What a call gives where each group of rows, of all that there are, runs in its `scope`.

    `names` are those of `args`, as far as `lies` goes by them.
    """
    order = [row for rows in groups.values() for row in rows]
    positional = [*zip(args, [*names, *[""] * len(args)], strict=False)]
    outputs = []
    for key, rows in groups.items():

        def own(name: str, value: Any, rows: Sequence[int] = rows) -> Any:
            part = _part(rows, len(order), partial(lies.inputs, name))
            return pytree.tree_map_only(Tensor, part, value)

        named = {name: own(name, value) for name, value in kwargs.items()}
        with scope(key):
            outputs.append(run(*(own(name, value) for value, name in positional), **named))
    flat = [pytree.tree_flatten(output) for output in outputs]
    if any(spec != flat[0][1] for _, spec in flat):
        raise _cannot_put_back("of another structure for each group of rows")
    counts, back = [*map(len, groups.values())], torch.tensor(order, device="cpu").argsort()
    leaves = zip(*(leaves for leaves, _ in flat), strict=True)
    dims = map(lies.outputs, _numbers(outputs[0]))
    together = [
        _together(parts, counts, back, dim, lies.sizes)
        for parts, dim in zip(leaves, dims, strict=True)
    ]
    return pytree.tree_unflatten(together, flat[0][1])


def _part(
    rows: Sequence[int], b: int, lies: Callable[[Tensor], int | None]
) -> Callable[[Tensor], Tensor]:
    """What takes some of b rows out of a tensor that has them."""

    def part(x: Tensor) -> Tensor:
        dim = lies(x)
        if dim is None:
            return x
        index = torch.tensor(rows, device=x.device)
        each = x.unflatten(dim, (b, x.shape[dim] // b))
        return each.index_select(dim, index).flatten(dim, dim + 1)

    return part


def _numbers(output: Any) -> list[int]:
    """Of each leaf of an output, the number of the part that it is in."""
    parts = output if isinstance(output, tuple | list) else (output,)
    return [i for i, part in enumerate(parts) for _ in pytree.tree_leaves(part)]


def _together(
    parts: Sequence[Any], counts: Sequence[int], back: Tensor, dim: int, sizes: Collection[int]
) -> Any:
    """One output of several groups, as one output in the order of the batch."""
    if all(isinstance(p, Tensor) and p.dim() > dim for p in parts):
        size = parts[0].shape[dim] // counts[0]
        lengths = [p.shape[dim] for p in parts]
        alike = len({(*p.shape[:dim], *p.shape[dim + 1 :]) for p in parts}) == 1
        if alike and size in sizes and lengths == [size * count for count in counts]:
            each = zip(parts, counts, strict=True)
            rows = torch.cat([p.unflatten(dim, (count, size)) for p, count in each], dim)
            return rows.index_select(dim, back.to(rows.device)).flatten(dim, dim + 1)
    elif all(p is parts[0] or (not isinstance(p, Tensor) and p == parts[0]) for p in parts):
        return parts[0]
    shown = f"a tensor of shape {tuple(parts[0].shape)}" if isinstance(parts[0], Tensor) else ""
    raise _cannot_put_back(shown or f"a {type(parts[0]).__name__}")


def uncached(
    run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call that is to make no cache. Raises PeftliteError if it is given one."""
    if any(hasattr(x, "get_seq_length") for x in (*args, *kwargs.values())):
        raise PeftliteError(
            "rows= can't split the cache that this call is given, which is of all rows: call the "
            "model without one, in generate by use_cache=False, or by a pl.DeltaBank, with one"
        )
    names = [*inspect.signature(run).parameters]
    makes = "use_cache" in names[len(args) :] and kwargs.get("use_cache") is None
    return {**kwargs, "use_cache": False} if makes else kwargs


def _cannot_put_back(what: str) -> PeftliteError:
    return PeftliteError(
        f"rows= can't put back an output that has no row per input row ({what}): ask the model "
        "for outputs per row (no loss, no cache: use_cache=False), or call it once per delta"
    )
