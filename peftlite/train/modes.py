"""What a model is put into for a while: modes, frozen parameters, activation checkpointing."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from peftlite.errors import PeftliteError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode; every module's own is as before afterwards."""
    with _mode(model, False):
        yield model


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """The model in training mode; every module's own is as before afterwards."""
    with _mode(model, True):
        yield


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, but for blocks that keep no activations, as they do in training."""
    with _mode(model, False):
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False) is True:
                module.training = True
        yield


@contextmanager
def _mode(model: nn.Module, flag: bool) -> Iterator[None]:
    # what a module was told: one that keeps the base's statistics shows another
    before = {module: vars(module).get("training", module.training) for module in model.modules()}
    model.train(flag)
    try:
        yield
    finally:
        for module, own in before.items():
            module.training = own


@contextmanager
def others_frozen(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Nothing else of the model gets gradients; there are none before, and none are left."""
    own = {id(p): p for p in parameters}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    for parameter in others:
        parameter.requires_grad_(False)
    for parameter in own.values():
        parameter.grad = None
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
        for parameter in own.values():
            parameter.grad = None


@contextmanager
def gradient_checkpointing(model: nn.Module) -> Iterator[None]:
    """The blocks keep no activations: the backward pass computes them again.

    By the model's own `gradient_checkpointing_enable`, as transformers' have it, or else by
    `blocks`. Raises PeftliteError if there is neither.
    """
    # transformers' own, by its name from 5 on
    new = hasattr(model, "activation_checkpointing_enable")
    its = "activation_checkpointing" if new else "gradient_checkpointing"
    enable, disable = (getattr(model, f"{its}_{verb}", None) for verb in ("enable", "disable"))
    with ExitStack() as after:
        if enable is not None and disable is not None:
            was_enabled = getattr(model, f"is_{its}")
            enable(**{f"{its}_kwargs": {"use_reentrant": False}})
            if not was_enabled:
                after.callback(disable)
        elif found := blocks(model):
            for block in found:
                block.forward = functools.partial(_recomputed, block.forward)
                after.callback(delattr, block, "forward")
        else:
            raise PeftliteError(
                "gradient_checkpointing goes by the blocks of an nn.ModuleList, and this model has "
                "none: use torch.utils.checkpoint in its forward"
            )
        yield


def blocks(model: nn.Module) -> list[nn.Module]:
    """The members of a model's `nn.ModuleList`s, each once, but for those inside another member."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    members = dict.fromkeys(block for each in lists for block in each if block not in lists)
    inner = {module for block in members for module in block.modules() if module is not block}
    return [block for block in members if block not in inner]


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
