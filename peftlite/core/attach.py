"""attach and detach: a delta put on a model, and taken off with nothing left of it."""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from peftlite.core import host
from peftlite.core.assign import Placed, assign, methods_in
from peftlite.core.delta import Delta, Registry
from peftlite.core.find import changeable, find, is_foreign, require_delta
from peftlite.core.merged import undone
from peftlite.core.patch import Method
from peftlite.core.site import Site, walk, whole_address
from peftlite.core.tensors import is_quantized
from peftlite.core.turns import at_rest, in_turn, watch_steps
from peftlite.errors import PeftliteError, TargetError
from peftlite.quant.holder import is_part
from peftlite.table import listed

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def deltas(model: nn.Module) -> dict[str, Delta]:
    """The deltas of a model by name, in the order in which they were attached; none if it has none.

    Raises PeftliteError if several modules inside this one have deltas.

    Example:
        model = nn.Linear(4, 2)
        pl.attach(model, pl.BitFit(), name="sql")
        assert list(pl.deltas(model)) == ["sql"]
    """
    found = find(model)
    return dict(found[1].deltas) if found else {}


@in_turn
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

    Example:
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        delta = pl.attach(model, pl.LoRA(rank=2), name="sql")
        optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-3)
    """
    methods = methods_in(method)
    check(model, name)
    return commit(model, new_delta(model, methods, name))


def new_delta(model: nn.Module, methods: Sequence[Method], name: str) -> Delta:
    """A new delta for the model, its parameters filled, attached to nothing. Raises TargetError."""
    placed: list[Placed] = []
    for how, sites in assign(model, methods):
        own = Placed.all(sites, how)
        tensors = [None if site.is_call else site.tensor for site in sites]
        with torch.no_grad(), _reading(how, sites):
            how.reset_all([item.patch for item in own], tensors)
        placed += own
    return Delta(name, methods, placed)


@contextlib.contextmanager
def _reading(method: Method, sites: Sequence[Site]) -> Iterator[None]:
    """Says of an error that a method reads a quantised tensor as it begins."""
    quantized = [site for site in sites if not site.is_call and is_quantized(site.whole)]
    try:
        yield
    except (NotImplementedError, AssertionError, RuntimeError) as error:
        if not quantized:
            raise
        kind, made = type(quantized[0].whole).__name__, type(method).__name__
        raise TargetError(
            f"{quantized[0].address} is quantised, a {kind}, and {made} begins with its numbers: "
            "take what doesn't, as pl.LoRA(init='kaiming'), or a base that isn't quantised"
        ) from error


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
    if is_foreign(model, registry.choice):
        raise PeftliteError(
            "some of these modules have deltas that were attached to another module, inside this "
            "one or around it: attach to that one, or detach them there first"
        )
    changeable(registry)
    return registry


# a part of a model may be about to have deltas of its own, under a lock of its own
_planting = threading.RLock()


def commit(root: nn.Module, delta: Delta) -> Delta:
    """Installs a delta as the standing choice, or leaves the model as it was."""
    watch_steps()
    with _planting:
        registry = check_model(root)
        return _commit(root, registry, delta)


def _commit(root: nn.Module, registry: Registry, delta: Delta) -> Delta:
    choice = registry.choice
    with restoring(root, registry):
        host.make_root(root, choice, registry)
        for address, placed in delta.placed.items():
            for i, (module, slot) in enumerate(placed.site.owners):
                key = slot + address[len(whole_address(address)) :]
                host.plant(module, delta.name, key, placed.patch, choice, owner=i == 0)
        host.settle(root, choice, deltas=True)
        if not registry.deltas:
            base = dict(base_parameters(root, [delta]))
            registry.thawed = tuple(name for name, p in base.items() if p.requires_grad)
            for name in registry.thawed:
                base[name].requires_grad_(False)
            registry.buffers = {name: b.clone() for name, b in _buffers(root)}
            # calls that began when the model was no host have no choice of their own
            choice.await_calls(root)
        registry.deltas[delta.name] = delta
        delta.home = registry
        choice.publish((delta.name,))
    return delta


def check_in_place(root: nn.Module, delta: Delta) -> None:
    """Raises PeftliteError if what a delta's patches sit on is no longer in the model."""
    modules: set[int] = set()
    holders: dict[int, set[tuple[int, str]]] = {}
    for _, module in walk(root):
        modules.add(id(module))
        for slot, tensor in module._parameters.items():
            holders.setdefault(id(tensor), set()).add((id(module), slot))
    for address, placed in delta.placed.items():
        placed.check()
        site = placed.site
        owners = {(id(module), slot) for module, slot in site.owners}
        there = all(id(module) in modules for module, _ in site.owners)
        stored = site.module._parameters.get(site.slot)
        kept = stored is None or holders.get(id(stored)) == owners
        if not (there and kept):
            raise PeftliteError(
                f"{address} was replaced, or tied to another, since {delta.name!r} was attached: "
                "pl.detach it, and attach to the model as it is now"
            )


@contextlib.contextmanager
def settled(delta: Delta) -> Iterator[Callable[[], None]]:
    """Runs its body while no thread changes a delta or its model, which has to be whole.

    Gives a function that raises PeftliteError if the delta was written to all the same.
    """
    parameters = [p for p in delta.parameters() if not p.is_inference()]
    with at_rest(parameters), delta.turn():
        if delta.home is not None and (root := delta.home.root) is not None:
            check_in_place(root, delta)
        versions = [p._version for p in parameters]

        def unchanged() -> None:
            if versions != [p._version for p in parameters]:
                raise PeftliteError(
                    f"{delta.name!r} was written to while it was being saved, by another thread "
                    "that no torch.optim.Optimizer steps in: save it between two of its steps"
                )

        yield unchanged


def _buffers(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The numbers of the base that no optimizer moves, and that a checkpoint of it has."""
    for path, module in walk(root):
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set or buffer.is_meta:
                continue
            # codes and their scales move by merging alone
            if buffer.itemsize > 1 and not is_quantized(buffer) and not is_part(module, name):
                yield f"{path}.{name}" if path else name, buffer


def warn_of_buffers(registry: Registry | None, stacklevel: int) -> None:
    """Warns if buffers of the base have moved since the first delta was attached."""
    if registry is None or registry.root is None:
        return
    now, before = dict(_buffers(registry.root)), registry.buffers
    known = now.keys() & before.keys() - registry.originals.keys()
    moved = [name for name in known if not _alike(now[name], before[name])]
    if moved:
        warnings.warn(
            f"buffers of the base have moved since deltas were attached: {listed(sorted(moved))}; "
            "a delta's file doesn't hold them, and detaching leaves them: keep their modules in "
            "eval mode while a delta trains, or load the base's own values again",
            stacklevel=stacklevel,
        )


def _alike(now: Tensor, before: Tensor) -> bool:
    before = before.to(now)
    return now.shape == before.shape and torch.equal(now.nan_to_num(), before.nan_to_num())


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
        for delta in registry.deltas.values():
            delta.home = None
        registry.__dict__.update(known)
        registry.choice.publish(standing)
        for delta in registry.deltas.values():
            delta.home = registry
        for parameter, flag in trainable:
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)
        raise


@in_turn
def detach(model: nn.Module, delta: Delta | str) -> Delta:
    """Takes a delta off the model, which is exactly as if it had never been attached.

    A merged delta is unmerged first. If it was chosen, the base is the choice. With the last delta,
    the base's `requires_grad` is as it was before the first. Raises PeftliteError; the model is
    then as it was.

    Example:
        model = nn.Linear(4, 2)
        delta = pl.attach(model, pl.LoRA(rank=2), name="sql")
        pl.detach(model, delta)  # or its name
    """
    root, registry, delta = require_delta(model, delta)
    warn_of_buffers(registry, stacklevel=4)
    record = registry.merged.get(delta.name)
    with quiet(root, registry):
        undo = contextlib.nullcontext() if record is None else undone(registry, record)
        with restoring(root, registry), undo:
            return remove(root, registry, delta.name)


@contextlib.contextmanager
def quiet(root: nn.Module, registry: Registry) -> Iterator[None]:
    """Runs its body while no other thread is in a call of the model, or of a view of it."""
    with contextlib.ExitStack() as stack:
        for choice in (registry.choice, *registry.views):
            stack.enter_context(choice.closed(root))
        yield


def remove(root: nn.Module, registry: Registry, name: str) -> Delta:
    """Takes a delta off, whatever the base's weights hold now."""
    delta, choice = registry.deltas.pop(name), registry.choice
    delta.home = None
    choice.publish(tuple(n for n in choice.standing if n != name))
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
    host.settle(root, registry.choice, deltas=bool(registry.deltas))
    if not registry.deltas and isinstance(root, host.Host):
        root.peftlite.registry = None
        host.release(root)


def base_parameters(
    root: nn.Module, deltas: Iterable[Delta] = ()
) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model but those of its deltas."""
    patched = {id(parameter) for delta in deltas for parameter in delta.parameters()}
    return ((n, p) for n, p in root.named_parameters() if id(p) not in patched)
