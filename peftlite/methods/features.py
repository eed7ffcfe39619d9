"""Features: how wide what a module's call takes and gives is, for patches that change calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftlite.core import maps
from peftlite.core.site import CALL, Site, output_head, walk


class Features(NamedTuple):
    """The features that a call takes (None if it takes others, such as ids) and gives."""

    i: int | None
    o: int
    dim: int = -1  # the dimension they lie along


def is_called(module: nn.Module) -> bool:
    """Whether a module is ever called: an attention's out_proj and lists of modules are not."""
    read_only = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return type(module).forward is not nn.Module.forward and not read_only


def arguments(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments that a module is called with."""
    return tuple(inspect.signature(module.forward).parameters)


def by_name(names: Iterable[str], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def features(site: Site, width: int | None = None) -> Features | None:
    """The features of a call; `width` is used where no layer itself says it. None if unknown."""
    module = site.module
    if found := of_layer(module):
        return found
    if width is not None:
        layers = [f for _, m in walk(module) if (f := of_layer(m))]
        return Features(width, width, layers[-1].dim if layers else -1)
    if inspect.unwrap(type(module).forward) is nn.Sequential.forward:
        return _of_sequential(module)
    head = output_head(module) if site.address == CALL else None
    last = head and of_layer(head)
    return last._replace(i=None) if last else _of_block(module)


def of_layer(module: nn.Module) -> Features | None:
    """The features of a layer that torch or transformers define, and of norms of any making."""
    match module:
        case nn.Linear(in_features=i, out_features=o):
            return Features(i, o)
        case nn.MultiheadAttention(embed_dim=d):
            return Features(d, d)
        case nn.Bilinear(out_features=o):
            return Features(None, o)
        case nn.Embedding(embedding_dim=d) | nn.EmbeddingBag(embedding_dim=d):
            return Features(None, d)
        case nn.modules.conv._ConvNd(out_channels=o, kernel_size=kernel):
            return Features(None, o, -1 - len(kernel))  # places differ between input and output
        case nn.modules.batchnorm._NormBase(num_features=d) | nn.GroupNorm(num_channels=d):
            return Features(d, d, 1)
        case nn.LayerNorm(normalized_shape=shape) | nn.RMSNorm(normalized_shape=shape):
            return Features(shape[-1], shape[-1])
        case nn.RNNBase(input_size=i, hidden_size=h, proj_size=p, bidirectional=two):
            return Features(i, (p or h) * (2 if two else 1))
        case nn.RNNCellBase(input_size=i, hidden_size=h):
            return Features(i, h)
        case nn.PReLU():
            return None
        case nn.Module(weight=Tensor(shape=(i, o))) if maps.is_linear(module):
            return Features(i, o)  # the Conv1D of transformers
        case nn.Module(weight=Tensor(shape=(d,))):  # a norm's scale
            return Features(d, d)
    return None


def _of_sequential(module: nn.Sequential) -> Features | None:
    """From what the first layer takes to what the last one gives."""
    ends = [f for m in module if (f := of_layer(m) or _of_block(m))]
    return Features(ends[0].i, ends[-1].o, ends[-1].dim) if ends else None


def _of_block(module: nn.Module) -> Features | None:
    """A block gives as many features as it takes."""
    layers = [(m, f) for _, m in walk(module) if (f := of_layer(m))]
    linear = [f for m, f in layers if _mixes(m)]
    if not linear or any(f.dim != -1 for _, f in layers):
        return None
    if len(linear) == 1:
        return linear[0]
    # what some map takes and some map gives; of several widths, what comes in first
    both, first = {f.i for f in linear} & {f.o for f in linear}, layers[0][1].i
    width = first if first in both else both.pop() if len(both) == 1 else None
    return None if width is None else Features(width, width)


def _mixes(module: nn.Module) -> bool:
    """Whether it is a linear map of features, or an attention over them."""
    return isinstance(module, nn.MultiheadAttention) or (
        maps.is_linear(module) and not isinstance(module, nn.modules.conv._ConvNd)
    )


def change_first(output: Any, change: Callable[[Any], Tensor]) -> Any:
    """A call's output, with the tensor that it is, or begins with, changed."""
    if isinstance(output, Tensor):
        return change(output)
    # level by level: what else is in there, such as a cache, stays the object it is
    parts, spec = pytree.tree_flatten(output, is_leaf=lambda part: part is not output)
    if not parts or parts[0] is output:
        return change(output)
    return pytree.tree_unflatten([change_first(parts[0], change), *parts[1:]], spec)
