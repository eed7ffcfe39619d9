"""Delta: a named set of patches in one model; and the registry in which the model keeps them."""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.assign import Placed
from peftlite.core.choice import Choice, Names
from peftlite.core.patch import Method, Patch
from peftlite.core.residual import Residual
from peftlite.core.site import Site
from peftlite.core.tensors import shard_like
from peftlite.core.tree import Tree, tree
from peftlite.core.turns import lock_of
from peftlite.errors import PeftliteError
from peftlite.spelling import hint
from peftlite.table import Shown, Table, listed, short, size, table


class Weighted:
    """Deltas with weights, as `0.7 * sql - chat` makes them for `pl.combine`."""

    def __init__(self, terms: Mapping[Delta, float]):
        self._terms = terms

    @property
    def terms(self) -> Mapping[Delta, float]:
        """The weight of each delta."""
        return self._terms

    def __mul__(self, factor: float) -> Weighted:
        if not isinstance(factor, Real):
            return NotImplemented
        return Weighted({delta: factor * weight for delta, weight in self.terms.items()})

    __rmul__ = __mul__

    def __neg__(self) -> Weighted:
        return -1 * self

    def __add__(self, other: Weighted) -> Weighted:
        if not isinstance(other, Weighted):
            return NotImplemented
        ours, theirs = self.terms, other.terms
        return Weighted({d: ours.get(d, 0) + theirs.get(d, 0) for d in {**ours, **theirs}})

    def __sub__(self, other: Weighted) -> Weighted:
        return self + -other

    def __repr__(self) -> str:
        return " + ".join(f"{weight:g} * {delta.name}" for delta, weight in self.terms.items())


class Delta(Shown, Weighted):
    """A named set of patches in one model: what is trained, saved, merged and swapped."""

    name: str
    methods: tuple[Method, ...]

    def __init__(self, name: str, methods: Sequence[Method], placed: Iterable[Placed]):
        self.name, self.methods = name, tuple(methods)
        self.placed: dict[str, Placed] = {item.site.address: item for item in placed}
        self.energy: dict[str, float] = {}  # the share that `combine` or `extract` kept of a change
        self._home: weakref.ref[Registry] | None = None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a Delta has no attribute {name!r}{hint(name, dir(Delta))}")

    @property
    def terms(self) -> Mapping[Delta, float]:
        return {self: 1.0}

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters and buffers as `address:name`, shared ones once."""
        return self._once(lambda patch: patch.state_dict(keep_vars=True))

    def _once(self, of: Callable[[Patch], Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        seen: dict[int, Tensor] = {}  # which keeps them, so that no other gets the id
        for address, placed in self.placed.items():
            for key, tensor in of(placed.patch).items():
                if id(tensor) not in seen:
                    seen[id(tensor)] = tensor
                    yield f"{address}:{key}", tensor

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters as `address:name`, shared ones once."""
        for key, tensor in self.named_tensors():
            if isinstance(tensor, nn.Parameter):
                yield key, tensor

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters, for an optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    def by_method(self) -> list[tuple[Method, list[Placed]]]:
        """Each of its methods, and what that placed."""
        groups: dict[int, list[Placed]] = {id(method): [] for method in self.methods}
        for item in self.placed.values():
            groups[id(item.method)].append(item)
        return [(method, groups[id(method)]) for method in self.methods]

    @property
    def home(self) -> Registry | None:
        """The registry of the model that it is attached to."""
        return None if self._home is None else self._home()

    @home.setter
    def home(self, registry: Registry | None) -> None:
        # the registry holds the delta: held back, it would keep a model alive that is let go
        self._home = None if registry is None else weakref.ref(registry)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_home": None}  # a copy's registry tells it

    @property
    def merged(self) -> bool:
        """Whether it is in the base's weights now."""
        return self.merged_in is not None

    @property
    def merged_in(self) -> Registry | None:
        """The registry of the model that it is merged into."""
        home = self.home
        return home if home is not None and self.name in home.merged else None

    def turn(self) -> AbstractContextManager[Any]:
        """A `with` in which no other thread's verb changes the model that it is attached to."""
        root = None if self.home is None else self.home.root
        return nullcontext() if root is None else lock_of(root)

    @property
    def num_parameters(self) -> int:
        """How many numbers it trains, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def num_bytes(self) -> int:
        """The bytes of its parameters and buffers, which is what a file of it holds."""
        return sum(t.nbytes for t in self.saved().values())

    def requires_grad_(self, flag: bool = True) -> Delta:
        """Makes the delta trainable, or freezes it. Nothing else ever changes that."""
        for parameter in self.parameters():
            parameter.requires_grad_(flag)
        return self

    def parameter_groups(self, lr: float, b_ratio: float = 1.0) -> list[dict[str, Any]]:
        """The parameters as groups for an optimizer: LoRA's factors B learn at `b_ratio * lr`.

        Hayou et al., "LoRA+", arXiv:2402.12354, §4, take 16 for the ratio. Raises PeftliteError if
        a ratio is asked for and there is no B.
        """
        patches = [placed.patch for placed in self.placed.values()]
        later = {id(getattr(patch, name)) for patch in patches for name in patch.later}
        if b_ratio != 1 and not later:
            kinds = ", ".join(type(method).__name__ for method in self.methods)
            raise PeftliteError(f"b_ratio is for LoRA's factors B, and {kinds} has none")
        groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        for parameter in self.parameters():
            groups[id(parameter) in later].append(parameter)
        rates = {False: lr, True: b_ratio * lr}
        return [{"params": group, "lr": rates[b]} for b, group in groups.items() if group]

    def regularizer(self) -> Tensor:
        """What the delta's methods add to the loss, a scalar; 0 where they add nothing."""
        terms = [placed.patch.regularizer() for placed in self.placed.values()]
        device = next((p.device for p in self.parameters()), None)
        return sum((t.to(device) for t in terms if t is not None), torch.zeros((), device=device))

    @torch.no_grad()
    def step(self) -> None:
        """Lets the methods act on their patches, as AdaLoRA does to keep to its budget.

        Call it after every `optimizer.step()` and before the gradients are cleared.
        """
        with self.turn():
            self._step()

    def _step(self) -> None:
        for method, placed in self.by_method():
            method.step([item.patch for item in placed])

    def state_dict(self) -> dict[str, Tensor]:
        """Every parameter and buffer as `address:name`, shared ones once, sharing memory."""
        return {key: tensor.detach() for key, tensor in self.named_tensors()}

    def saved(self) -> dict[str, Tensor]:
        """What a file of it holds: the state but for what training alone needs."""
        return {key: tensor.detach() for key, tensor in self._once(lambda patch: patch.saved())}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies values into the delta, in place. Raises PeftliteError, all or none copied."""
        if not isinstance(tensors, Mapping):
            raise PeftliteError(f"load_state_dict takes a dict of tensors, not {short(tensors)}")
        own = self.state_dict()
        if problems := misfits(own, tensors):
            raise PeftliteError(
                f"these tensors don't fit {self.name!r}: there is {listed(problems)}"
            )
        with self.turn():
            for key, tensor in own.items():
                tensor.copy_(shard_like(tensors[key], tensor))

    def _summary(self) -> str:
        kinds = ", ".join(type(method).__name__ for method in self.methods)
        return f"{self.name!r}, {kinds}, {self.num_parameters:,} parameters"

    def _lines(self) -> Iterator[str]:
        yield f"delta {self.name!r}"
        yield self.table()
        yield self.total()

    def tree(self) -> Tree:
        """The model with the delta's patches where they sit, to print or to see in a notebook.

        Blocks that are alike are folded, `layers.0-11`; parameters of the base and of the delta are
        counted, and it says whether the delta is chosen, and what trains. Raises PeftliteError if
        it is attached to no model.

        Example:
            model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
            print(pl.attach(model, pl.LoRA(rank=2, targets="weight"), name="sql").tree())
        """
        home = self.home
        if home is None or home.root is None:
            raise PeftliteError(
                f"{self.name!r} is attached to no model, or that is gone: print(delta) lists its "
                "sites; pl.load it into a model, and keep the model, to see where it sits"
            )
        chosen = self.name in home.choice.standing
        how = "merged" if self.merged else "chosen" if chosen else "not chosen"
        trains = any(p.requires_grad for p in self.parameters())
        state = f"{how}, {'trains' if trains else 'frozen'}, {self.num_parameters:,} parameters"
        with self.turn():
            return tree(f"delta {self.name!r}: {state}", home.root, self.placed.values())

    def table(self) -> Table:
        """A table of its sites; those that differ only in a block's number share a line."""
        groups: dict[tuple[str, str, str], list[str]] = {}
        for address, placed in self.placed.items():
            site = placed.site
            pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", address)
            shape = "call" if site.is_call else "×".join(map(str, site.shape))
            kind = type(placed.method).__name__
            groups.setdefault((pattern, kind, shape), []).append(address)
        lines = []
        for (pattern, kind, shape), members in groups.items():
            of_group = (p for a in members for p in self.placed[a].patch.parameters())
            count = sum({id(p): p.numel() for p in of_group}.values())
            shown = pattern if len(members) > 1 else members[0]
            lines.append([shown, str(len(members)), kind, shape, f"{count:,}"])
        return table(["site", "sites", "method", "shape", "parameters"], lines)

    def total(self) -> str:
        """How many sites each of its methods has, and its size, in a line."""
        kinds = Counter(type(placed.method).__name__ for placed in self.placed.values())
        made = ", ".join(f"{kind} at {count}" for kind, count in kinds.items())
        return f"{made} sites: {self.num_parameters:,} parameters, {size(self.num_bytes)}"


@dataclass
class Merged:
    """One delta in the base: the tensors it is in, with its patches, and the choice before."""

    delta: Delta
    touched: dict[str, tuple[Site, list[Patch]]]
    standing: Names


@dataclass
class Registry:
    """What a model knows of its deltas. It hangs on the root, the module they are attached to."""

    choice: Choice = field(default_factory=Choice)
    deltas: dict[str, Delta] = field(default_factory=dict)
    thawed: tuple[str, ...] = ()  # the base's parameters that were trainable, to be so again
    originals: dict[str, Tensor | Residual] = field(default_factory=dict)  # see merged.py
    merged: dict[str, Merged] = field(default_factory=dict)  # in the order of merging
    buffers: dict[str, Tensor] = field(default_factory=dict)  # as the first delta found them
    views: weakref.WeakSet[Choice] = field(default_factory=weakref.WeakSet)
    _root: weakref.ref[nn.Module] | None = None

    def hang_on(self, root: nn.Module) -> None:
        """Says which module has it, which keeps it alive, and not the other way."""
        self._root = weakref.ref(root)

    @property
    def root(self) -> nn.Module | None:
        """The module that the deltas are attached to, while there is one."""
        return None if self._root is None else self._root()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "views": None, "_root": None}  # a copy has no views yet

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, views=weakref.WeakSet())
        for delta in self.deltas.values():
            delta.home = self


def misfits(own: Mapping[str, Tensor], given: Mapping[str, Any]) -> list[str]:
    """What keeps given tensors from being a delta's own, in words."""
    problems = [f"no {key}" for key in own if key not in given]
    problems += [f"{key}, which nothing asks for" for key in given if key not in own]
    for key, mine in own.items():
        theirs = given.get(key, mine)
        if not isinstance(theirs, Tensor):
            problems.append(f"{key} as {short(theirs)}, no tensor")
        elif theirs.shape != mine.shape:
            problems.append(f"{key} as {tuple(theirs.shape)}, not {tuple(mine.shape)}")
        elif theirs.dtype is not mine.dtype and not (
            theirs.is_floating_point() and mine.is_floating_point() and theirs.itemsize > 1
        ):
            problems.append(f"{key} as {theirs.dtype}, not {mine.dtype}")
        elif theirs.is_meta and not mine.is_meta:
            problems.append(f"{key} on the meta device, without values")
    return problems
