"""Split: at the call of a module inside which rows can't be told apart, one pass for each delta.

On their way to experts tokens leave their rows, and what reads its weights, as recurrent layers and
nn.MultiheadAttention do, has one value of each for all rows. There the rows of each delta go
through by themselves, and what is inside finds one delta for all of its batch. Where tokens can be
told apart on their way, one pass does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map_only

from peftlite.bank.families.reading import in_order, is_read
from peftlite.bank.route import Router
from peftlite.bank.rows import ByToken, Rows
from peftlite.bank.training import training_rows
from peftlite.core.choice import uncompiled
from peftlite.core.groups import COMMON, Lies, in_groups
from peftlite.core.patch import Patch
from peftlite.core.site import CALL, Site, walk
from peftlite.core.tokens import Lost, Tokens
from peftlite.errors import PeftliteError, TargetError
from peftlite.methods.features import arguments, is_called

EXPERTS = "experts"
"""What models call a module to whose parts tokens are sent."""


class Split(Patch):
    """At the call of a module, outside of all that a bank has there and inside."""

    site: Site
    router: Router

    def __init__(self, site: Site, router: Router):
        super().__init__()
        self.site, self.router = site, router
        self.slot: str = CALL
        self._names: Sequence[str] = arguments(site.module)
        self._routes: bool = routes(site.module)

    def call(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _eagerly(self, inner, args, kwargs)
        rows = self.router.now()
        if rows is None or len(rows.slots) == 1:
            return inner(*args, **kwargs)
        groups, only = rows.by_slot(), partial(self._only, rows)
        if len(groups) > 1 and self._routes and args:
            with suppress(Lost):
                return self._at_once(inner, rows, *args, **kwargs)
        if len(groups) > 1:
            lies = self._lies((*args, *kwargs.values()), len(rows.numbers))
            return in_groups(inner, groups, only, lies, args, kwargs, self._names)
        with only(*groups):
            return inner(*args, **kwargs)

    def _at_once(
        self, inner: Callable[..., Any], rows: Rows, x: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """One pass for all, where tokens are told apart on their way. Raises Lost."""
        self.router.rows(x)  # which checks that it's a batch
        with self.router.scope(ByToken.like(rows)):
            own = rows.places.to(x.device).repeat_interleave(len(x) // len(rows.numbers))
            found = inner(Tokens.of(x, own), *args, **kwargs)
        return tree_map_only(Tokens, lambda tokens: tokens.plain, found)

    def _only(self, rows: Rows, slot: int) -> AbstractContextManager[None]:
        """A `with` in which all rows have the delta of one slot."""
        if rows.tables is None:
            return self.router.scope(Rows.of((slot,)))
        own = self.router.leaves.get(slot)
        return self.router.scope(training_rows((slot,), {} if own is None else {slot: own}))

    def _lies(self, given: Sequence[Any], b: int) -> Lies:
        """Where b rows lie in a call that is given these. Raises PeftliteError."""
        module, x = self.site.module, next((v for v in given if isinstance(v, Tensor)), None)
        told = isinstance(module, nn.RNNBase | nn.MultiheadAttention)
        odd = [v for v in given if isinstance(v, PackedSequence) or hasattr(v, "get_seq_length")]
        if x is None or odd or (told and x.dim() != 3):
            shown = type(odd[0]).__name__ if odd else x if x is None else tuple(x.shape)
            raise PeftliteError(
                f"{self.site.address} is called with {shown}, in which rows can't be told apart: "
                "leave what is inside out of the bank's methods with exclude="
            )
        batch = int(told and not module.batch_first)
        self.router.rows(x.movedim(batch, 0))  # which checks that it's a batch
        size = x.shape[batch] // b
        if isinstance(module, nn.RNNBase):
            return _of_recurrent(batch, size)
        return _of_attention(batch, size) if told else _first(x, size)


_eagerly = uncompiled(
    lambda split, inner, args, kwargs: split.call(inner, *args, **kwargs),
    "experts, recurrent layers and nn.MultiheadAttention that a bank's deltas change run one pass "
    "for each delta of the batch, which fullgraph code can't: compile without fullgraph",
)


def _of_recurrent(batch: int, size: int) -> Lies:
    """States are (layers, b, h), wherever the inputs have their rows."""
    inputs = {"input": batch}
    return Lies(lambda name, _: inputs.get(name, 1), lambda i: 1 if i else batch, (size,))


def _of_attention(batch: int, size: int) -> Lies:
    """Masks and weights have their rows first; a mask (t, s) is for all."""
    inputs = {"query": batch, "key": batch, "value": batch}

    def lies(name: str, x: Tensor) -> int | None:
        return None if name == "attn_mask" and x.dim() == 2 else inputs.get(name, 0)

    return Lies(lies, lambda i: 0 if i else batch, (size,))


def _first(x: Tensor, size: int) -> Lies:
    """Whatever is as long as x (b, t, …), or as its tokens (b·t, …), has its rows first."""
    t = x.shape[1] if x.dim() > 2 else 1

    def lies(name: str, y: Tensor) -> int | None:
        as_long = y.dim() > 0 and len(y) in (len(x), len(x) * t)
        return 0 if as_long and name not in COMMON else None

    return Lies(lies, sizes=(size, size * t))


# -- where


def split_at(model: nn.Module, site: Site) -> set[nn.Module]:
    """The modules that are split for what is at a site. Raises TargetError if none can be."""
    if not is_read(site) and not any(map(_expert, site.names)):
        return set()
    modules = dict(walk(model))
    return {_around(modules, name, site) for name in site.names}


def _expert(name: str) -> bool:
    return EXPERTS in name.split(".")


def _around(modules: Mapping[str, nn.Module], name: str, site: Site) -> nn.Module:
    """The innermost module around a site whose inputs have their rows in order."""
    path = name.removesuffix(CALL) if site.is_call else name.rpartition(".")[0]
    parts = path.split(".") if path else []
    if EXPERTS in parts:
        parts = parts[: parts.index(EXPERTS) + 1]
        outwards = not routes(modules[".".join(parts)])
    else:
        outwards = not (in_order(site) or routes(modules[path]))
    parts = parts[: len(parts) - outwards]
    while parts and not is_called(modules[".".join(parts)]):
        parts.pop()
    module = modules[".".join(parts)]
    if is_called(module):
        return module
    raise TargetError(
        f"{site.address} is inside of no module that is called with a batch, so its rows can't be "
        "told apart: leave it out of the bank's methods with exclude="
    )


def routes(module: nn.Module) -> bool:
    """Whether a module itself sends tokens to experts, by indices that it is given."""
    return is_called(module) and any(n.endswith(("index", "indices")) for n in arguments(module))
