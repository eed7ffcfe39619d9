"""Host: a module whose class is swapped so that patches change what it reads and what it computes.

                reads                                  calls
    module.weight ─► property ─► raw ─► value ─► W'     module(x) ─► forward ─► call ─► call ─► y
                                                                                └► inner: the base

Nothing else about the module changes: its parameters, their names and its place in the tree stay,
so base checkpoints load, and optimizers, `.to()` and DDP see the model they know. The patches hang
beside `_modules`, so an nn.Sequential doesn't run them; who asks for the children finds them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from peftlite.core import read, recompute
from peftlite.core.choice import HIDDEN, Choice, Names, NamesByRow, uncompiled
from peftlite.core.groups import by_rows
from peftlite.core.maps import Map, PatchedMap, is_theirs, kind_of
from peftlite.core.patch import Patch, apply
from peftlite.core.site import CALL, keeps_statistics
from peftlite.core.tensors import is_quantized, is_sharded, raw
from peftlite.errors import PeftliteError
from peftlite.quant.others import rewrites
from peftlite.quant.packed import Packed
from peftlite.table import listed

ATTRIBUTE = "peftlite"
_is_grad_enabled = torch.is_grad_enabled


_NONE: dict[str, tuple[Patch, ...]] = {}


class Patches(nn.Module):
    """What hangs on a host: its patches as `{delta: {slot: patch}}`, and the model's choice."""

    def __init__(self, choice: Choice):
        super().__init__()
        self.choice = choice
        self.registry: Any = None  # what the model knows of its deltas, on its root alone
        self.still = False  # whether the module keeps the base's statistics, in training too
        self.face: type | None = None  # a class that is laid over the model's own
        self.kind: type[Map] | None = None
        self.theirs = False  # whether its weight was packed by another library
        self.own_forward: Callable[..., Any] | None = None  # the module's, where it has one
        # torch's fused transformer layer bypasses its parts unless one of them has a hook
        self._forward_hooks[0] = _no_fused_path

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value  # a delta may be named "training", and torch would object

    def active(self, names: Names) -> dict[str, tuple[Patch, ...]]:
        """The patches that `names` activate, by slot, in the order in which they apply."""
        groups: dict[str, Any] = self._modules
        if len(names) == 1:
            group = groups.get(names[0])
            return _NONE if group is None else group.by_slot
        found: dict[str, tuple[Patch, ...]] = {}
        for name in names:
            if name in groups:
                for slot, patches in groups[name].by_slot.items():
                    found[slot] = found.get(slot, ()) + patches
        return found

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        """x: for a model that runs its `children()` in turn, a step that does nothing."""
        return x

    @property
    def slots(self) -> frozenset[str]:
        return frozenset(slot for group in self._modules.values() for slot in group.by_slot)  # type: ignore


class Group(nn.Module):
    """One delta's patches on a module; a slot has several where each changes a part of it.

    Of the modules that share a tied tensor, the first has the patch as a child; the rest use it.
    """

    def __init__(self):
        super().__init__()
        self.by_slot: dict[str, tuple[Patch, ...]] = {}

    def put(self, key: str, patch: Patch, owner: bool) -> None:
        if owner:
            self._modules[key] = patch
        self.by_slot[patch.slot] = (*self.by_slot.get(patch.slot, ()), patch)


def _no_fused_path(*_: Any) -> None:
    """A hook that does nothing."""


class Host:
    """What a swapped class adds: the patches travel wherever the module's own tensors go."""

    # a class made from a host's, as `type(model)(config)` does, has none of its own
    peftlite: Patches = Patches(Choice())

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        if self in memo:
            return
        yield from super().named_modules(memo, prefix, remove_duplicate)
        inside = f"{prefix}.{ATTRIBUTE}" if prefix else ATTRIBUTE
        if self.peftlite._modules:
            yield from self.peftlite.named_modules(memo, inside, remove_duplicate)

    def get_parameter(self, target: str) -> nn.Parameter:
        # torch reads the attribute, and what a patched one shows is no parameter
        path, _, name = target.rpartition(".")
        parameter = self.get_submodule(path)._parameters.get(name)
        return super().get_parameter(target) if parameter is None else parameter

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        # `.to()`, `.train()` and fully_shard find the patches here
        if self.peftlite._modules:
            yield ATTRIBUTE, self.peftlite
        yield from super().named_children()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        inside = f"{prefix}{ATTRIBUTE}."
        self.peftlite.state_dict(destination=destination, prefix=inside, keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        inside = f"{prefix}{ATTRIBUTE}."
        own = {k: v for k, v in state_dict.items() if k.startswith(inside)}
        base = {k: v for k, v in state_dict.items() if k not in own}
        super()._load_from_state_dict(
            base, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not own:
            return  # a checkpoint of the base: complete as it is
        assign = local_metadata.get("assign_to_params_buffers", False)
        tensors = {k.removeprefix(inside): v for k, v in own.items()}
        try:
            wrong = self.peftlite.load_state_dict(tensors, strict=False, assign=assign)
        except RuntimeError as error:
            error_msgs.append(str(error))
            return
        missing_keys.extend(inside + key for key in wrong.missing_keys)
        unexpected_keys.extend(inside + key for key in wrong.unexpected_keys)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            value = _assigned(self, name, value)
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # the class is made anew where the copy is made: by its base, which can be imported
        made, (base, *how) = type(self), type(self)._made_of
        func, args, *rest = super().__reduce_ex__(protocol)
        plain = tuple(base if a is made else a for a in args)
        return (_revive, (func, plain, base, *how), *rest)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.peftlite.registry is not None:
            self.peftlite.registry.hang_on(self)


def _revive(func: Callable[..., Any], args: tuple[Any, ...], base: type, *how: Any) -> nn.Module:
    module = func(*args)
    module.__class__ = host_class(base, *how)
    return module


def _assigned(module: Any, slot: str, value: Tensor) -> Tensor:
    """What a module is to have in a slot. Raises PeftliteError if it was quantised with a delta."""
    if type(value) is read.Read:
        # tying assigns one module's weight, as read, to another: what is meant is the parameter
        return value.raw
    before = module._parameters.get(slot)
    if before is not None and is_quantized(value) and not is_quantized(before):
        if slot in module.peftlite.slots:
            raise PeftliteError(
                f"{slot!r} of a {type(module).__name__} was quantised as it is read, with the "
                "delta in it, which would apply twice: pl.detach, quantise the base, then attach"
            )
    return value


# a class goes with the last module of it: what is made in a notebook's cell is not kept for ever
_classes: WeakValueDictionary[tuple, type] = WeakValueDictionary()


def host_class(
    base: type,
    slots: frozenset[str],
    root: bool = False,
    still: bool = False,
    face: type | None = None,
) -> type:
    """A subclass of `base` that reads `slots` through patches; one each, so graphs are shared.

    Args:
        root: whether its calls are the model's.
        still: whether its running statistics stay those of the base in training.
        face: a class whose attributes come before those of `base`.
    """
    key = id(base), slots, root, still, face
    made = _classes.get(key)
    return _classes.setdefault(key, _host_class(base, *key[1:])) if made is None else made


def _host_class(
    base: type, slots: frozenset[str], root: bool, still: bool, face: type | None
) -> type:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hosted = self.peftlite
        choice = hosted.choice
        names = choice.standing  # before `apart`, which is set before it changes
        if choice.apart:
            names = choice.now()
        if type(names) is not tuple:
            return _apart(self, names, args, kwargs)
        active = hosted.active(names) if names else _NONE
        grad = _is_grad_enabled()
        if active and not grad:
            _check_reached(names, active)
        inner: Any = None
        patches = None
        if hosted.kind is not None and (active or hosted.theirs):
            inner, patches = _mapped(self, hosted.kind, active, args or (*kwargs.values(),))
        if inner is None:
            inner = hosted.own_forward or functools.partial(base.forward, self)
            if active and not torch.compiler.is_compiling():
                inner = functools.partial(read.within, inner)
        elif "x" in kwargs:  # as the Conv1D of transformers calls a map's input
            args = (kwargs.pop("x"), *args)
        if CALL in active:
            patches = (patches or ()) + active[CALL]
        if not patches:
            return inner(*args, **kwargs)
        last: Any = patches[-1]
        for patch in patches[:-1]:
            inner = PatchedMap(patch, inner)
        return last.call(inner, *args, **kwargs)

    outer: Any = _announced(forward) if root else forward
    outer.__signature__ = inspect.signature(base.forward)
    made_of = (base, slots, root, still, face)
    body: dict[str, Any] = {"forward": outer, "_made_of": made_of, "__module__": base.__module__}
    body |= {slot: _property(base, slot) for slot in slots if slot != CALL}
    if issubclass(base, nn.RNNBase):
        body |= {"_flat_weights": _FLAT_WEIGHTS, "_update_flat_weights": lambda self: None}
    if issubclass(base, nn.TransformerEncoder):
        body["use_nested_tensor"] = property(lambda self: False, lambda self, _: None)
    if still:
        body["training"] = _TRAINING
    made = type(base.__name__, (Host, base) if face is None else (Host, face, base), body)
    made.__qualname__ = base.__qualname__
    return made


def base_class(module: nn.Module) -> type:
    """The class a module has, or had before it became a host."""
    return type(module)._made_of[0] if isinstance(module, Host) else type(module)


def registry_of(module: nn.Module) -> Any:
    """What hangs on a module of a model's deltas; None if it's not the one that has it."""
    hosted = module.__dict__.get(ATTRIBUTE)  # it may be gone at the next line, or come
    return hosted.registry if isinstance(hosted, Patches) else None


def _announced(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's `forward`, which says that it runs: its choice stays what it is to its end."""

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return forward(self, *args, **kwargs)
        hosted, thread = self.__dict__.get(ATTRIBUTE), get_ident()
        if hosted is None and not isinstance(self, Host):  # the deltas have just gone
            return self.forward(*args, **kwargs)
        if hosted is None:  # a model made of a host's class, as a slice of an nn.Sequential is
            return forward(self, *args, **kwargs)
        choice = hosted.choice
        if thread in choice.calls:
            return forward(self, *args, **kwargs)
        choice.begin(thread)
        try:
            if self.__dict__.get(ATTRIBUTE) is hosted:
                return forward(self, *args, **kwargs)
        finally:
            choice.end(thread)
        return self.forward(*args, **kwargs)

    return call


def _set_training(module: Any, mode: bool) -> None:
    module.__dict__["training"] = mode  # which it's in again once the last delta is off


_TRAINING = property(
    lambda module: not module.peftlite.still and module.__dict__["training"], _set_training
)


def _property(base: type, slot: str) -> property:
    def get(self: Any) -> Tensor:
        return _read(self, slot)

    below = getattr(base, slot, None)  # a parametrized tensor is a property already
    return property(get, below.fset if isinstance(below, property) else None)


def _read(module: Any, slot: str) -> Tensor:
    w, hosted = raw(module, slot), module.peftlite
    names = hosted.choice.standing
    if hosted.choice.apart:
        names = hosted.choice.now()
    if names is HIDDEN:
        return _read_eagerly(module, slot)
    if isinstance(names, NamesByRow):
        raise PeftliteError(
            f"{slot!r} is read outside of a call of its module while rows= is in force: "
            "call the model itself, so that the rows can be told apart"
        )
    patches = hosted.active(names).get(slot)
    if is_sharded(w):  # FSDP looks for its own shard by name, which may be of codes
        return module._parameters.get(slot, w)
    if not patches:
        return w if type(w) is not Packed or w.source is None else w.source
    if not _is_grad_enabled():
        _check_reached(names, {slot: patches})
    return apply(patches, w) if torch.compiler.is_compiling() else read.shown(w, patches)


def _check_reached(names: Names, active: dict[str, tuple[Patch, ...]]) -> None:
    """Raises PeftliteError where patches would train and a checkpointed call keeps them from it."""
    if torch.compiler.is_dynamo_compiling() or not recompute.in_function():
        return
    trains = any(
        p.requires_grad for patches in active.values() for patch in patches
        for p in patch.parameters()
    )  # fmt: skip
    if trains and recompute.is_cut_off(host_class(nn.Identity, frozenset()).forward.__code__):
        raise PeftliteError(
            f"no gradient would reach {listed(map(repr, names))} here: the call is checkpointed "
            "with use_reentrant=True, and nothing that goes into it needs a gradient. Checkpoint "
            "with use_reentrant=False, in transformers by "
            "model.gradient_checkpointing_enable({'use_reentrant': False}); or call "
            "model.enable_input_require_grads()"
        )


_read_eagerly = uncompiled(lambda module, slot: getattr(module, slot).clone())
_call_eagerly = uncompiled(lambda module, args, kwargs: module.forward(*args, **kwargs))


def _apart(module: Any, names: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call under a choice that is no plain one."""
    if names is HIDDEN:
        return _call_eagerly(module, args, kwargs)
    return by_rows(module.forward, module.peftlite.choice, names, args, kwargs)


def _mapped(
    module: nn.Module, kind: type[Map], active: dict[str, tuple[Patch, ...]], args: tuple[Any, ...]
) -> tuple[Map | None, tuple[Patch, ...] | None]:
    """A linear map, and the patches to lay over it: all on its weight can, or they are read in."""
    on_weight, on_bias = active.get("weight"), active.get("bias")
    if not on_weight and not on_bias and not module.peftlite.theirs:
        return None, None
    weight, bias = raw(module, "weight"), module._parameters.get("bias")
    if bias is None:
        bias = module._buffers.get("bias")
    if module.peftlite.theirs:  # whose codes don't always tell what they are read in
        dtype = args[0].dtype
        weight = weight.read_in(dtype) if isinstance(weight, Packed) else weight.to(dtype)
    if type(weight) is not nn.Parameter and is_sharded(weight):
        raise PeftliteError(
            "this weight is sharded over devices while it is used, as tensor parallelism does: "
            "patches can't ride on a shard; attach before fully_shard, or gather the weight"
        )
    if on_bias:
        bias = apply(on_bias, bias)
    for patch in on_weight or ():
        if not patch.has_call:
            return kind(module, apply(on_weight, weight), bias), None
    return kind(module, weight, bias), on_weight


def _set_flat_weights(module: Any, weights: list[Tensor]) -> None:
    plain = [w.raw if type(w) is read.Read else w for w in weights]
    module.__dict__["_flat_weights"] = plain


# an RNN keeps its weights in a list beside the parameters: read them afresh instead
_FLAT_WEIGHTS = property(
    lambda self: [getattr(self, name, None) for name in self._flat_weights_names],
    _set_flat_weights,
)


# -- planting and uprooting: the only code that changes a module


@contextlib.contextmanager
def restoring(root: nn.Module) -> Iterator[None]:
    """Runs its body; if that fails, every module's class and what hangs on it are as they were."""
    before = []
    for module in root.modules():
        hosted = module.__dict__.get(ATTRIBUTE)
        ours = isinstance(hosted, Patches)
        patched = (hosted, hosted.__dict__.copy(), hosted._modules.copy()) if ours else None
        before.append((module, type(module), module.__dict__.copy(), patched))
    try:
        yield
    except BaseException:
        for module, kind, own, patched in before:
            if type(module) is not kind:
                module.__class__ = kind
            for name in module.__dict__.keys() - own.keys():
                del module.__dict__[name]
            module.__dict__.update(own)
            if patched is not None:
                hosted, state, patches = patched
                hosted.__dict__.update(state)
                _put_back(hosted._modules, patches)
        raise


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    # at no moment is it empty: another thread may be running the module
    for key in now.keys() - before.keys():
        del now[key]
    now.update(before)
    if [*now] != [*before]:  # something was gone, as no call sees it
        now.clear()
        now.update(before)


def make_host(module: nn.Module, choice: Choice) -> Patches:
    """Makes a module a host without patches; no change if it is one. Raises PeftliteError."""
    if ATTRIBUTE in module.__dict__ and isinstance(module, Host):
        if not module.peftlite._modules:
            module.peftlite.choice = choice  # it was left inert
        return module.peftlite
    if not isinstance(module, Host) and hasattr(module, ATTRIBUTE):
        raise PeftliteError(
            f"a {type(module).__name__} has an attribute {ATTRIBUTE!r} of its own, where its "
            "patches would go: rename it"
        )
    hosted = Patches(choice).train(module.training)
    own_forward = module.__dict__.get("forward")
    hosted.theirs = is_theirs(module)
    hosted.kind = kind_of(module) if own_forward is None or hosted.theirs else None
    hosted.own_forward = own_forward
    try:
        module.__class__ = host_class(base_class(module), frozenset())
        module.__dict__[ATTRIBUTE] = hosted
    except Exception as error:
        raise PeftliteError(
            f"{type(module).__name__} can't be patched, since Python refuses to subclass it or to "
            f"swap its class ({error}); wrap it in a plain nn.Module and attach to that"
        ) from error
    module.__dict__.pop("forward", None)
    return hosted


def plant(
    module: nn.Module, name: str, key: str, patch: Patch, choice: Choice, owner: bool
) -> None:
    """Puts a delta's patch on a module, under a key that tells it from the delta's others."""
    groups: dict[str, Any] = make_host(module, choice)._modules
    groups.setdefault(name, Group()).put(key, patch, owner)
    _swap_class(module)


def uproot(module: nn.Module, name: str) -> None:
    """Takes a delta's patches off a module; the last one out leaves it as it was."""
    if isinstance(module, Host) and module.peftlite._modules.pop(name, None) is not None:
        release(module)


def make_root(module: nn.Module, choice: Choice, registry: Any) -> None:
    """Hangs what a model knows of its deltas on it."""
    make_host(module, choice).registry = registry
    registry.hang_on(module)
    _swap_class(module)


def lay_over(root: Any, face: type) -> None:
    """Lays a class over that of a model with deltas, until the last of them is off."""
    root.peftlite.face = face
    _swap_class(root)


def settle(root: nn.Module, choice: Choice, deltas: bool) -> None:
    """Makes hosts of what has to know of deltas in the model, if there are any, and else frees it.

    These are torch's encoders around patches, which can't take nested tensors, what keeps running
    statistics, which are the base's and stay, and what would rewrite its own codes.
    """
    for module in [*root.modules()]:
        if rewrites(module):
            if deltas:
                make_host(module, choice)
            elif isinstance(module, Host):
                release(module)
        if isinstance(module, nn.TransformerEncoder):
            if any(isinstance(m, Patches) and m._modules for m in module.modules()):
                make_host(module, choice)
            elif isinstance(module, Host):
                release(module)
        elif "running_mean" in module._buffers and keeps_statistics(module):
            if deltas:
                make_host(module, choice).still = True
                _swap_class(module)
            elif isinstance(module, Host):
                module.peftlite.still = False
                release(module)


def release(module: nn.Module) -> None:
    """Gives a host its class back if nothing hangs on it any more."""
    hosted = module.peftlite
    if hosted._modules or hosted.registry is not None:
        _swap_class(module)
        return
    if "_made_of" not in type(module).__dict__ or "forward" in module.__dict__:
        _swap_class(module)
        return  # something was made over ours (by FSDP, by accelerate): stay, without effect
    module.__class__ = base_class(module)
    del module.__dict__[ATTRIBUTE]
    if hosted.own_forward is not None:
        module.__dict__["forward"] = hosted.own_forward


def _swap_class(module: Any) -> None:
    if "_made_of" in type(module).__dict__:
        hosted, base = module.peftlite, base_class(module)
        root = hosted.registry is not None
        module.__class__ = host_class(base, hosted.slots, root, hosted.still, hosted.face)
