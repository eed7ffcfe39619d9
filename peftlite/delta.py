"""Delta: a named set of patches in one model; and the verbs to attach, detach and choose one."""

from __future__ import annotations

import copy
import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftlite import host, site
from peftlite.choice import Choice, Names, Rows
from peftlite.errors import PeftliteError, TargetError
from peftlite.patch import Method, Patch
from peftlite.site import Site
from peftlite.table import few, shown, size, table

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


@dataclass(eq=False)
class Placed:
    """One patch of a delta: where it sits and which method made it."""

    site: Site
    method: Method
    patch: Patch
    shape: torch.Size | None  # the whole tensor's, when it was placed

    @classmethod
    def build(cls, where: Site, method: Method) -> Placed:
        """A patch for a site, its parameters not yet filled. Raises TargetError."""
        patch = method.build(where)
        kind = type(method).__name__
        if not isinstance(patch, Patch):
            raise PeftliteError(
                f"{kind}.build gave {shown(patch)} for {where.address}: no pl.Patch"
            )
        if not (patch.call if where.is_call else patch.has_value):
            need = "call" if where.is_call else "value"
            raise PeftliteError(f"{kind}'s patch needs a `{need}` to sit at {where.address}")
        patch.train(where.module.training)
        patch.slot, patch.index = where.slot, where.index
        return cls(where, method, patch, None if where.is_call else where.whole.shape)

    def check(self) -> None:
        """Raises PeftliteError if the model was taken apart under the patch."""
        where = self.site
        hosted = where.module.__dict__.get(host.ATTRIBUTE)
        if hosted is not None and not where.is_call and where.whole.shape != self.shape:
            raise PeftliteError(
                f"{where.address} is {tuple(where.whole.shape)} now, and was {tuple(self.shape)} "
                "when the delta was attached: pl.detach, then resize, then attach"
            )


class Delta:
    """A named set of patches in one model: what is trained, saved, merged and swapped."""

    def __init__(self, name: str, methods: Sequence[Method], placed: Iterable[Placed]):
        self.name, self.methods = name, tuple(methods)
        self.placed = {item.site.address: item for item in placed}
        self.merged_in: Registry | None = None  # while it is merged

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters and buffers as `address:name`, shared ones once."""
        seen: set[int] = set()
        for address, placed in self.placed.items():
            for key, tensor in placed.patch.state_dict(keep_vars=True).items():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{address}:{key}", tensor

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters as `address:name`, shared ones once."""
        for key, tensor in self.named_tensors():
            if isinstance(tensor, nn.Parameter):
                yield key, tensor

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters, for an optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    @property
    def merged(self) -> bool:
        """Whether it is in the base's weights now."""
        return self.merged_in is not None

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def num_bytes(self) -> int:
        """The bytes of its parameters and buffers, which is what a file of it holds."""
        return sum(t.nbytes for t in self.state_dict().values())

    def requires_grad_(self, flag: bool = True) -> Delta:
        """Makes the delta trainable, or freezes it. Nothing else ever changes that."""
        for parameter in self.parameters():
            parameter.requires_grad_(flag)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Every parameter and buffer as `address:name`, shared ones once, sharing memory."""
        return {key: tensor.detach() for key, tensor in self.named_tensors()}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies values into the delta, in place. Raises PeftliteError, all or none copied."""
        if not isinstance(tensors, Mapping):
            raise PeftliteError(f"load_state_dict takes a dict of tensors, not {shown(tensors)}")
        if problems := self.misfits(tensors):
            raise PeftliteError(f"these tensors don't fit {self.name!r}: there is {few(problems)}")
        own = self.state_dict()
        for key, tensor in own.items():
            tensor.copy_(scatter(tensors[key], tensor))

    def misfits(self, tensors: Mapping[str, Any]) -> list[str]:
        """What keeps tensors from being this delta's, in words."""
        own = dict(self.named_tensors())
        problems = [f"no {key}" for key in own if key not in tensors]
        problems += [f"{key}, which nothing asks for" for key in tensors if key not in own]
        for key, mine in own.items():
            theirs = tensors.get(key, mine)
            if not isinstance(theirs, Tensor):
                problems.append(f"{key} as {shown(theirs)}, no tensor")
            elif theirs.shape != mine.shape:
                problems.append(f"{key} as {tuple(theirs.shape)}, not {tuple(mine.shape)}")
            elif theirs.is_floating_point() != mine.is_floating_point() or theirs.itemsize < 2:
                problems.append(f"{key} as {theirs.dtype}, not {mine.dtype}")
            elif theirs is not mine and theirs.is_meta:
                problems.append(f"{key} on the meta device, without values")
        return problems

    def __repr__(self) -> str:
        kinds = ", ".join(type(method).__name__ for method in self.methods)
        return f"Delta({self.name!r}, {kinds}, {self.num_parameters:,} parameters)"

    def __str__(self) -> str:
        rows = [
            _Row(address, type(p.method).__name__, p.site, p.patch)
            for address, p in self.placed.items()
        ]
        return f"delta {self.name!r}\n{_describe(rows)}"


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded over processes (every one has to ask)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def scatter(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as another is."""
    if not hasattr(like, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)


@dataclass
class Registry:
    """What a model knows of its deltas. It hangs on the root, the module they are attached to."""

    choice: Choice = field(default_factory=Choice)
    deltas: dict[str, Delta] = field(default_factory=dict)
    thawed: tuple[str, ...] = ()  # the base's parameters that were trainable, to be so again
    originals: dict[str, Tensor] = field(default_factory=dict)  # see merge.py
    merged: dict[str, Any] = field(default_factory=dict)
    views: weakref.WeakSet[Choice] = field(default_factory=weakref.WeakSet)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "views": None}  # a copy has no views yet

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, views=weakref.WeakSet())


def find(model: nn.Module) -> tuple[nn.Module, Registry] | None:
    """The root and registry of a model, or of the one inside it (under DDP, torch.compile, …)."""
    if not isinstance(model, nn.Module):
        raise PeftliteError(f"the model comes first, a torch.nn.Module: not {shown(model)}")
    found = []
    for module in model.modules():
        hosted = module.__dict__.get(host.ATTRIBUTE)
        if isinstance(hosted, host.Patches) and hosted.registry is not None:
            if module is model:
                return module, hosted.registry
            found.append((module, hosted.registry))
    if len(found) > 1:
        raise PeftliteError(
            "deltas are attached to several modules inside this one: pass the module that "
            "pl.attach was given"
        )
    return found[0] if found else None


def require(model: nn.Module, *names: str) -> tuple[nn.Module, Registry]:
    """The root and registry of a model that has deltas of these names. Raises PeftliteError."""
    found = find(model)
    if found is None:
        if _foreign(model, None):
            raise PeftliteError("this is a part of a model that has deltas: pass that model")
        raise PeftliteError("this model has no deltas; pl.attach or pl.load one first")
    there = list(found[1].deltas)
    for name in names:
        if isinstance(name, Delta):
            raise PeftliteError(f"a delta goes by its name here: {name.name!r}, not {name!r}")
        if name not in there:
            listed = ", ".join(map(repr, there))
            raise PeftliteError(f"no delta is named {name!r} in this model; there are: {listed}")
    return found


def _foreign(model: nn.Module, choice: Choice | None) -> bool:
    """Whether some of the model's modules have patches that obey another choice."""
    return any(
        module.peftlite._modules and module.peftlite.choice is not choice
        for module in model.modules()
        if isinstance(module, host.Host)
    )


def deltas(model: nn.Module) -> dict[str, Delta]:
    """The deltas of a model by name, in the order in which they were attached."""
    found = find(model)
    return dict(found[1].deltas) if found else {}


# -- attach and detach


def attach(model: nn.Module, method: Method | Sequence[Method], name: str = "default") -> Delta:
    """Attaches a new delta, in place: freezes the base and makes the delta the standing choice.

    The model keeps its class, its keys and its call site.

    Args:
        model: any module; every address is relative to it.
        method: what to attach, or several methods that make one delta.
        name: of letters, digits, `_` and `-`.

    Raises:
        TargetError: a target names nothing, or something the method can't take.
        PeftliteError: the name is taken or ill-formed, a module can't be patched, or gradients
            can't flow here (under `torch.inference_mode`). The model is as it was.
    """
    methods = _methods(method)
    check(model, name)
    placed = [Placed.build(where, how) for where, how in _assign(model, methods)]
    with torch.no_grad():
        for item in placed:
            item.patch.reset(None if item.site.is_call else item.site.tensor)
    return commit(model, Delta(name, methods, placed))


def check(model: nn.Module, name: str) -> None:
    """Raises PeftliteError if no delta called `name` can be attached to `model`."""
    if torch.is_inference_mode_enabled():
        raise PeftliteError(
            "under torch.inference_mode no gradient can ever flow: attach outside of it "
            "(torch.no_grad is fine)"
        )
    root, registry = find(model) or (model, Registry())
    if root is not model:
        raise PeftliteError(
            f"deltas {list(registry.deltas)} are attached to the {type(root).__name__} inside this "
            "module: attach to that one, or detach them first"
        )
    if _foreign(model, registry.choice):
        raise PeftliteError(
            "some of these modules have deltas that were attached to another module, inside this "
            "one or around it: attach to that one, or detach them there first"
        )
    changeable(registry)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PeftliteError(
            f"{name!r} can't name a delta: use letters, digits, '_' and '-', at most 128"
        )
    if name in registry.deltas:
        raise PeftliteError(
            f"a delta named {name!r} is attached already: choose another name=, or "
            f"pl.detach(model, {name!r}) first"
        )


def _assign(model: nn.Module, methods: Sequence[Method]) -> list[tuple[Site, Method]]:
    """Which method takes which site. A site that is asked for is taken from defaults."""
    everything = site.sites(model)
    taken: dict[str, tuple[Site, Method, bool]] = {}
    sharing: dict[str, list[str]] = {}  # the addresses taken of each whole tensor
    for method in methods:
        for where, asked in site.select(everything, method.targets, method.exclude, method):
            usable(where)
            others = sharing.setdefault(site.whole_address(where.address), [])
            for held in [taken[a] for a in others if taken[a][0].overlaps(where)]:
                if held[2] == asked:
                    raise TargetError(
                        f"{where.address} is taken by {type(held[1]).__name__} at "
                        f"{held[0].address} and by {type(method).__name__}: name it once, or leave "
                        "it out of one with exclude="
                    )
                if asked:
                    del taken[held[0].address]
                    others.remove(held[0].address)
            if asked or not any(taken[a][0].overlaps(where) for a in others):
                taken[where.address] = (where, method, asked)
                others.append(where.address)
    return [(where, method) for where, method, _ in taken.values()]


def _methods(given: Any) -> list[Method]:
    if isinstance(given, Method):
        return [given]
    methods = list(given) if isinstance(given, list | tuple) else [given]
    for method in methods:
        if isinstance(method, type) and issubclass(method, Method):
            raise PeftliteError(f"{method.__name__} is a class: write pl.{method.__name__}()")
    if not methods or not all(isinstance(method, Method) for method in methods):
        shown = f"a {type(given).__name__}" if isinstance(given, nn.Module) else repr(given)
        raise PeftliteError(
            f"give a method such as pl.LoRA(rank=8), or a list of them: not {shown}"
        )
    return methods


def usable(where: Site) -> None:
    """Raises PeftliteError if no patch can sit at a site, whatever the method."""
    if where.is_call:
        return
    tensor = where.whole
    if hasattr(tensor, "placements"):
        raise PeftliteError(
            f"{where.address} is sharded over devices: attach before fully_shard, so that the "
            "delta is sharded and its gradients are synchronised too"
        )
    if not tensor.is_floating_point():
        raise TargetError(f"{where.address} holds {tensor.dtype}: no gradient can flow through it")
    if tensor.is_inference():
        raise PeftliteError(
            f"{where.address} was made under torch.inference_mode, so autograd can't use it: "
            "build or load the model outside of it"
        )


def commit(root: nn.Module, delta: Delta) -> Delta:
    """Installs a delta as the standing choice, or leaves the model as it was."""
    _, registry = find(root) or (root, Registry())
    try:
        host.make_host(root, registry.choice).registry = registry
        for address, placed in delta.placed.items():
            for i, (module, slot) in enumerate(placed.site.owners):
                key = slot + address[len(site.whole_address(address)) :]
                host.plant(module, delta.name, key, placed.patch, registry.choice, owner=i == 0)
    except BaseException:
        _uproot(root, registry, delta)
        raise
    if not registry.deltas:
        base = dict(_base_parameters(root, [delta]))
        registry.thawed = tuple(name for name, p in base.items() if p.requires_grad)
        for name in registry.thawed:
            base[name].requires_grad_(False)
    registry.deltas[delta.name] = delta
    registry.choice.standing = (delta.name,)
    return delta


def _uproot(root: nn.Module, registry: Registry, delta: Delta) -> None:
    for placed in delta.placed.values():
        for module, _ in placed.site.owners:
            host.uproot(module, delta.name)
    if not registry.deltas and isinstance(root, host.Host):
        root.peftlite.registry = None
        host.release(root)


def _base_parameters(
    root: nn.Module, deltas: Iterable[Delta] = ()
) -> Iterator[tuple[str, nn.Parameter]]:
    patched = {id(parameter) for delta in deltas for parameter in delta.parameters()}
    return ((n, p) for n, p in root.named_parameters() if id(p) not in patched)


def detach(model: nn.Module, name: str) -> Delta:
    """Takes a delta off the model, which is exactly as if it had never been attached.

    A merged delta is unmerged first. If it was chosen, the base is the choice. With the last delta,
    the base's `requires_grad` is as it was before the first.
    """
    root, registry = require(model, name)
    changeable(registry)
    if name in registry.merged:
        registry.merged[name].undo(registry)
    return remove(root, registry, name)


def remove(root: nn.Module, registry: Registry, name: str) -> Delta:
    """Takes a delta off, whatever the base's weights hold now."""
    delta, choice = registry.deltas.pop(name), registry.choice
    choice.standing = tuple(n for n in choice.standing if n != name)
    _uproot(root, registry, delta)
    if not registry.deltas:
        parameters = dict(_base_parameters(root))
        for key in registry.thawed:
            if key in parameters:
                parameters[key].requires_grad_(True)
    return delta


# -- choosing


def use(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Makes a delta, or several in that order, or none (the base), the model's standing choice.

    It holds in every thread. It doesn't change what is trainable. Raises PeftliteError.
    """
    _, registry = require(model)
    changeable(registry)
    registry.choice.standing = _names(model, names)


def using(
    model: nn.Module,
    names: str | Sequence[str] | None = None,
    *,
    rows: Sequence[str | Sequence[str] | None] | None = None,
) -> AbstractContextManager[None]:
    """A `with` in which the choice is `names`, or one per batch row, for this context alone.

    Threads and async tasks never see one another's. With `rows`, the outermost patched module that
    is called runs each group of equal rows by itself and puts the results back: every tensor
    argument with `len(rows)` as its first dimension is split.
    `torch.compile`d code honours it by running eagerly, and refuses it under `fullgraph=True`; to
    compile it in, open it inside the compiled function. Raises PeftliteError.
    """
    _, registry = require(model)
    changeable(registry)
    if rows is None:
        return registry.choice.scope(_names(model, names))
    if names is not None or not isinstance(rows, list | tuple) or not rows:
        raise PeftliteError(
            f"rows= is a list with one choice per batch row, in place of a name: not {rows!r}"
        )
    return registry.choice.scope(Rows(tuple(_names(model, row) for row in rows)))


def view(model: nn.Module, names: str | Sequence[str] | None) -> Any:
    """A second face of the model: the same parameters and buffers, its choice fixed to `names`.

    Two views compile once each, export, and serve two threads. What trains or loads into one is
    seen by all. Attach, detach, choose and merge on the model itself. Raises PeftliteError.
    """
    _, registry = require(model)
    checked = _names(model, names)
    if any(hasattr(p, "placements") for p in model.parameters()):
        raise PeftliteError("a model under fully_shard can't be copied, so it can have no view")
    shared = [*model.parameters(), *model.buffers(), *registry.originals.values()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    choice = require(twin)[1].choice
    choice.standing, choice.fixed = checked, True
    registry.views.add(choice)
    return twin


def _names(model: nn.Module, names: str | Iterable[str] | None) -> Names:
    if names is not None and not isinstance(names, str | list | tuple | Delta):
        raise PeftliteError(f"a choice is a delta's name, a list of names, or None: not {names!r}")
    chosen = () if names is None else tuple(names) if isinstance(names, list | tuple) else (names,)
    _, registry = require(model, *chosen)
    for name in chosen:
        if name in registry.merged:
            raise PeftliteError(
                f"{name!r} is merged into the base, so it is on already: pl.unmerge it to choose it"
            )
    if len(set(chosen)) < len(chosen):
        raise PeftliteError(f"{list(chosen)} names a delta twice; each applies once")
    return chosen


def changeable(registry: Registry) -> None:
    """Raises PeftliteError if the registry is a view's."""
    if registry.choice.fixed:
        raise PeftliteError(
            "this is a view, whose choice is fixed: do it on the model that pl.view was given"
        )


# -- looking before touching


@dataclass
class _Row:
    address: str
    method: str
    site: Site
    patch: Patch

    def shape(self) -> str:
        return "call" if self.site.is_call else "×".join(map(str, self.site.shape))


@dataclass
class Plan:
    """What `attach` would do; printing it shows a table.

    `addresses` are the sites, `num_parameters` what would be trained there, `num_bytes` what a file
    of it would hold, and `base_parameters` the size of the model.
    """

    rows: list[_Row]
    base_parameters: int

    @property
    def addresses(self) -> list[str]:
        return [row.address for row in self.rows]

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in _parameters(self.rows))

    @property
    def num_bytes(self) -> int:
        return _bytes(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        share = self.num_parameters / max(self.base_parameters, 1)
        return f"{_describe(self.rows)} ({share:.3%} of the base's {self.base_parameters:,})"


def plan(model: nn.Module, method: Method | Sequence[Method]) -> Plan:
    """What `attach` would do: the sites, counts and bytes. Changes nothing. Raises TargetError."""
    methods = _methods(method)
    rows = [
        _Row(where.address, type(how).__name__, where, how.build(replace(where, on="meta")))
        for where, how in _assign(model, methods)
    ]
    base = _base_parameters(model, deltas(model).values())
    return Plan(rows, sum(p.numel() for _, p in base))


def _parameters(rows: Iterable[_Row]) -> list[nn.Parameter]:
    return list({id(p): p for row in rows for p in row.patch.parameters()}.values())


def _bytes(rows: Iterable[_Row]) -> int:
    """Of the parameters and buffers, shared ones once."""
    tensors = (t for row in rows for t in row.patch.state_dict(keep_vars=True).values())
    return sum(tensor.nbytes for tensor in {id(t): t for t in tensors}.values())


def _describe(rows: list[_Row]) -> str:
    """A table of sites, those that differ only in a block's number in one line."""
    groups: dict[tuple[str, str, str], list[_Row]] = {}
    for row in rows:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", row.address)
        groups.setdefault((pattern, row.method, row.shape()), []).append(row)
    lines = []
    for (pattern, method, shape), members in groups.items():
        count = sum(p.numel() for p in _parameters(members))
        address = pattern if len(members) > 1 else members[0].address
        lines.append([address, str(len(members)), method, shape, f"{count:,}"])
    kinds = Counter(row.method for row in rows)
    parameters = _parameters(rows)
    total = f"{sum(p.numel() for p in parameters):,} parameters, "
    total += size(_bytes(rows))
    made = ", ".join(f"{kind} at {count}" for kind, count in kinds.items())
    head = table(["site", "sites", "method", "shape", "parameters"], lines)
    return f"{head}\n{made} sites: {total}"
