"""attach and detach; and the registry in which a model keeps its deltas."""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core import host
from peftlite.core.assign import Placed, assign, methods_in
from peftlite.core.choice import Choice
from peftlite.core.delta import Delta
from peftlite.core.patch import Method
from peftlite.core.residual import Residual
from peftlite.core.site import whole_address
from peftlite.errors import PeftliteError
from peftlite.table import shown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


@dataclass
class Registry:
    """What a model knows of its deltas. It hangs on the root, the module they are attached to."""

    choice: Choice = field(default_factory=Choice)
    deltas: dict[str, Delta] = field(default_factory=dict)
    thawed: tuple[str, ...] = ()  # the base's parameters that were trainable, to be so again
    originals: dict[str, Tensor | Residual] = field(default_factory=dict)  # see merge.py
    merged: dict[str, Any] = field(default_factory=dict)
    views: weakref.WeakSet[Choice] = field(default_factory=weakref.WeakSet)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "views": None}  # a copy has no views yet

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, views=weakref.WeakSet())
        for merged in self.merged.values():
            merged.delta.merged_in = self


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
    methods = methods_in(method)
    check(model, name)
    return commit(model, begin(model, methods, name))


def begin(model: nn.Module, methods: Sequence[Method], name: str) -> Delta:
    """A new delta for the model, its parameters filled, attached to nothing. Raises TargetError."""
    placed: list[Placed] = []
    for how, sites in assign(model, methods):
        own = Placed.all(sites, how)
        with torch.no_grad():
            tensors = [None if where.is_call else where.tensor for where in sites]
            how.begin([item.patch for item in own], tensors)
        placed += own
    return Delta(name, methods, placed)


def check(model: nn.Module, name: str) -> None:
    """Raises PeftliteError if no delta called `name` can be attached to `model`."""
    registry = check_model(model)
    check_name(name)
    if name in registry.deltas:
        raise PeftliteError(
            f"a delta named {name!r} is attached already: choose another name=, or "
            f"pl.detach(model, {name!r}) first"
        )


def check_name(name: str) -> None:
    """Raises PeftliteError if `name` can't name a delta."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PeftliteError(
            f"{name!r} can't name a delta: use letters, digits, '_' and '-', at most 128"
        )


def check_model(model: nn.Module) -> Registry:
    """The registry of a model, or a new one. Raises PeftliteError if nothing can be attached."""
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
    return registry


def commit(root: nn.Module, delta: Delta) -> Delta:
    """Installs a delta as the standing choice, or leaves the model as it was."""
    _, registry = find(root) or (root, Registry())
    with restoring(root, registry):
        host.make_host(root, registry.choice).registry = registry
        for address, placed in delta.placed.items():
            for i, (module, slot) in enumerate(placed.site.owners):
                key = slot + address[len(whole_address(address)) :]
                host.plant(module, delta.name, key, placed.patch, registry.choice, owner=i == 0)
        host.settle_encoders(root, registry.choice)
        if not registry.deltas:
            base = dict(base_parameters(root, [delta]))
            registry.thawed = tuple(name for name, p in base.items() if p.requires_grad)
            for name in registry.thawed:
                base[name].requires_grad_(False)
        registry.deltas[delta.name] = delta
        registry.choice.standing = (delta.name,)
    return delta


@contextlib.contextmanager
def restoring(root: nn.Module, registry: Registry) -> Iterator[None]:
    """Runs its body; if that fails, the model and what it knows of its deltas are as they were."""
    known = {k: v.copy() if isinstance(v, dict) else v for k, v in registry.__dict__.items()}
    standing = registry.choice.standing
    trainable = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    try:
        with host.restoring(root):
            yield
    except BaseException:
        registry.__dict__.update(known)
        registry.choice.standing = standing
        for delta in registry.deltas.values():
            delta.merged_in = registry if delta.name in registry.merged else None
        for parameter, flag in trainable:
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)
        raise


def detach(model: nn.Module, name: str) -> Delta:
    """Takes a delta off the model, which is exactly as if it had never been attached.

    A merged delta is unmerged first. If it was chosen, the base is the choice. With the last delta,
    the base's `requires_grad` is as it was before the first.
    """
    root, registry = require(model, name)
    changeable(registry)
    merged = registry.merged.get(name)
    with restoring(root, registry), merged.undone(registry) if merged else contextlib.nullcontext():
        return remove(root, registry, name)


def remove(root: nn.Module, registry: Registry, name: str) -> Delta:
    """Takes a delta off, whatever the base's weights hold now."""
    delta, choice = registry.deltas.pop(name), registry.choice
    choice.standing = tuple(n for n in choice.standing if n != name)
    _uproot(root, registry, delta)
    if not registry.deltas:
        parameters = dict(base_parameters(root))
        for key in registry.thawed:
            if key in parameters:
                parameters[key].requires_grad_(True)
    return delta


def _uproot(root: nn.Module, registry: Registry, delta: Delta) -> None:
    for placed in delta.placed.values():
        for module, _ in placed.site.owners:
            host.uproot(module, delta.name)
    host.settle_encoders(root, registry.choice)
    if not registry.deltas and isinstance(root, host.Host):
        root.peftlite.registry = None
        host.release(root)


def base_parameters(
    root: nn.Module, deltas: Iterable[Delta] = ()
) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model but those of its deltas."""
    patched = {id(parameter) for delta in deltas for parameter in delta.parameters()}
    return ((n, p) for n, p in root.named_parameters() if id(p) not in patched)


def changeable(registry: Registry) -> None:
    """Raises PeftliteError if the registry is a view's."""
    if registry.choice.fixed:
        raise PeftliteError(
            "this is a view, whose choice is fixed: do it on the model that pl.view was given"
        )
