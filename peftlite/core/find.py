"""Find: the registry in which a model keeps its deltas, and a delta by itself or by its name."""

from __future__ import annotations

from typing import Any

from torch import nn

from peftlite.core import host
from peftlite.core.choice import Choice
from peftlite.core.delta import Delta, Registry
from peftlite.core.site import walk
from peftlite.errors import PeftliteError
from peftlite.table import short


def find(model: nn.Module) -> tuple[nn.Module, Registry] | None:
    """The root and registry of a model, or of the one inside it (under DDP, torch.compile, …)."""
    if not isinstance(model, nn.Module):
        raise PeftliteError(f"the model comes first, a torch.nn.Module: not {short(model)}")
    found: dict[nn.Module, Registry] = {}
    for _, module in walk(model):
        if (registry := host.registry_of(module)) is not None:
            if module is model:
                return module, registry
            found[module] = registry
    if len(found) > 1:
        raise PeftliteError(
            "deltas are attached to several modules inside this one: pass the module that "
            "pl.attach was given"
        )
    return next(iter(found.items())) if found else None


def require(model: nn.Module) -> tuple[nn.Module, Registry]:
    """The root and registry of a model that has deltas. Raises PeftliteError."""
    found = find(model)
    if found is None:
        if is_foreign(model, None):
            raise PeftliteError("this is a part of a model that has deltas: pass that model")
        raise PeftliteError("this model has no deltas; pl.attach or pl.load one first")
    return found


def require_delta(model: nn.Module, given: Delta | str) -> tuple[nn.Module, Registry, Delta]:
    """The root and registry of a model, and a delta that may change. Raises PeftliteError."""
    root, registry = require(model)
    delta = named(registry, given)
    changeable(registry)
    return root, registry, delta


def named(registry: Registry, given: Delta | str) -> Delta:
    """A delta of a model, given itself or by its name. Raises PeftliteError."""
    if isinstance(given, Delta):
        if registry.deltas.get(given.name) is given:
            return given
        raise PeftliteError(f"{given.name!r} is no delta of this model, or no longer")
    if not isinstance(given, str) or given not in registry.deltas:
        there = ", ".join(map(repr, registry.deltas))
        raise PeftliteError(f"no delta is named {given!r} in this model; there are: {there}")
    return registry.deltas[given]


def given_delta(verb: str, given: Any, model: nn.Module | None) -> Delta:
    """A delta, given itself, or by its name in a model. Raises PeftliteError."""
    if model is not None:
        return named(require(model)[1], given)
    if not isinstance(given, Delta):
        raise PeftliteError(
            f"{verb} takes a delta, such as pl.deltas(model)['sql'], or its name with model=model: "
            f"not {short(given)}"
        )
    return given


def is_foreign(model: nn.Module, choice: Choice | None) -> bool:
    """Whether some of the model's modules have patches that obey another choice."""
    return any(
        hosted._modules and hosted.choice is not choice
        for _, module in walk(model)
        if isinstance(hosted := module.__dict__.get(host.ATTRIBUTE), host.Patches)
    )


def changeable(registry: Registry) -> None:
    """Raises PeftliteError if the registry is a view's."""
    if registry.choice.fixed:
        raise PeftliteError(
            "this is a view, whose choice is fixed: do it on the model that pl.view was given"
        )
