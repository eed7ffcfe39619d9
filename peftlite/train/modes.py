"""What a model is put into for a while: modes, frozen parameters, activation checkpointing."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from peftlite.errors import PeftliteError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode; every module's own is as before afterwards."""
    with _mode(model, False):
        yield model


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """The model in training mode, but for running statistics.

    They are the base's, and a delta wouldn't hold what training makes of them.
    """
    with _mode(model, True):
        for module in model.modules():
            if isinstance(module, _NormBase) and module.running_mean is not None:
                module.training = False
        yield


@contextmanager
def _mode(model: nn.Module, flag: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.train(flag)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


@contextmanager
def alone(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
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
def checkpointing(model: nn.Module) -> Iterator[None]:
    """The blocks keep no activations: the backward pass computes them again.

    By the model's own `gradient_checkpointing_enable`, as transformers' have it, or else by
    `blocks`. Raises PeftliteError if there is neither.
    """
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is not None:
        was = model.is_gradient_checkpointing
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            yield
        finally:
            if not was:
                model.gradient_checkpointing_disable()
        return
    found = blocks(model)
    if not found:
        raise PeftliteError(
            "gradient_checkpointing goes by the blocks of an nn.ModuleList, and this model has "
            "none: use torch.utils.checkpoint in its forward"
        )
    for block in found:
        block.forward = functools.partial(_again, block.forward)
    try:
        yield
    finally:
        for block in found:
            del block.forward


def blocks(model: nn.Module) -> list[nn.Module]:
    """What the `nn.ModuleList`s of a model hold, each once; not those within another's block."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    held = dict.fromkeys(block for each in lists for block in each if block not in lists)
    inner = {module for block in held for module in block.modules() if module is not block}
    return [block for block in held if block not in inner]


def _again(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
