"""The linear maps whose weight a low-rank change can ride beside, without ever forming W'.

A low-rank change of a weight is `left @ right`, with the weight flattened to a matrix along its
first dimension: `left` is (w.shape[0], r) and `right` is (r, w[0].numel()), whatever the module
means by its rows and columns. Each map knows how its operation distributes over the two factors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, nn

from peftlite.kernels import lora_linear
from peftlite.kernels.dispatch import is_plain
from peftlite.quant import others


class Map:
    """One module's linear operation, with its weight and bias as they are to be used.

    Calling it is calling the module. `transposed` says that the weight's first dimension is the
    input (embeddings, transposed convolutions, the `Conv1D` of GPT-2).
    """

    module: Any
    weight: Any  # a tensor, as the next is, or None: PatchedMap has them as properties
    bias: Any

    transposed = False
    because = ""
    """Why its products are torch's own in every path; nothing if they aren't."""

    def __init__(self, module: Any, weight: Tensor, bias: Tensor | None):
        self.module, self.weight, self.bias = module, weight, bias

    def __call__(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def low_rank(self, input: Tensor, y: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """What the map gives with `left` (n, r) `right` (r, m) for weight and no bias, as y is."""
        raise NotImplementedError

    def add_low_rank(
        self,
        left: Tensor,
        right: Tensor,
        scale: float,
        dropout: float,
        input: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The call, plus s times what `left @ right`, as above, gives for the input dropped out."""
        y, dtype = self(input, *args, **kwargs), self.weight.dtype
        x = F.dropout(input, dropout) if dropout and input.is_floating_point() else input
        change = self.low_rank(x, y, left.to(dtype), right.to(dtype))
        return torch.add(y, change, alpha=scale)


class PatchedMap(Map):
    """What a patch makes of a call: `inner`, the map or call that stood there, with it on top."""

    patch: Any
    inner: Any

    def __init__(self, patch: Any, inner: Any):
        self.patch, self.inner = patch, inner

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    @property
    def bias(self) -> Tensor | None:
        return self.inner.bias

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.patch.call(self.inner, *args, **kwargs)

    def low_rank(self, input: Tensor, y: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return self.inner.low_rank(input, y, left, right)


def unwrap(inner: Map) -> tuple[Map, list[Any]]:
    """The map itself that calls come down to, and the patches on its weight, the first first."""
    patches = []
    while isinstance(inner, PatchedMap):
        patches.insert(0, inner.patch)
        inner = inner.inner
    return inner, patches


class Linear(Map):
    def __call__(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)

    def low_rank(self, input: Tensor, y: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return F.linear(F.linear(input, right), left)

    def add_low_rank(
        self, left: Tensor, right: Tensor, scale: float, dropout: float, input: Tensor
    ) -> Tensor:
        if dropout or right.dtype is not self.weight.dtype or not is_plain(input, 0.0):
            return lora_linear(input, self.weight, self.bias, right, left, scale, dropout)
        # the reference, in line: here calls, and keywords, cost as much as the products
        y = F.linear(input, self.weight, self.bias)
        h = F.linear(input, right)
        if scale == 1 and y.dim() == 2:
            return F.linear(h, left, y)  # a bias may differ from row to row
        if y.dim() == 2:
            return torch.addmm(y, h, left.t(), alpha=scale)
        return torch.add(y, F.linear(h, left), alpha=scale)


class TransposedLinear(Map):
    """y = x W + b, with W as (i, o): the `Conv1D` of GPT-2 in transformers."""

    transposed = True

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], y.shape[-1])

    def low_rank(self, input: Tensor, y: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return input @ left @ right

    def add_low_rank(
        self, left: Tensor, right: Tensor, scale: float, dropout: float, x: Tensor
    ) -> Tensor:
        map = Linear(self.module, self.weight.t(), self.bias)
        return map.add_low_rank(right.t(), left.t(), scale, dropout, x)


class Embedding(Map):
    transposed = True
    because = "r numbers of a row are looked up"

    def __call__(self, input: Tensor) -> Tensor:
        # a weight that patches formed has a dense gradient
        return self._look_up(input, self.weight, self.module.sparse and self.weight.is_leaf)

    def low_rank(self, input: Tensor, y: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return self.spared(input, self._look_up(input, left, sparse=False) @ right)

    def spared(self, input: Tensor, y: Tensor) -> Tensor:
        """y (…, o) of ids (…): the padding row gives values and takes no gradients."""
        padding = self.module.padding_idx
        return y if padding is None else torch.where((input == padding)[..., None], y.detach(), y)

    def _look_up(self, input: Tensor, weight: Tensor, sparse: bool) -> Tensor:
        m = self.module
        return F.embedding(
            input, weight, m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq, sparse
        )


class Conv(Map):
    """A convolution: down by a convolution to r channels a group, up by a 1x1 one.

    Where r is too much for what a group has of channels, the change is a convolution of its own.
    """

    because = "torch has convolutions of its own"

    def __call__(self, input: Tensor) -> Tensor:
        return _with_bias(self, partial(self.module._conv_forward, input, self.weight))

    def low_rank(self, input: Tensor, y: Tensor, left: Tensor, right: Tensor) -> Tensor:
        groups, (_, *kernel) = self.module.groups, self.weight.shape
        if _is_costly(left, right, groups):
            return self.module._conv_forward(input, (left @ right).view(self.weight.shape), None)
        h = self.module._conv_forward(input, _for_each(groups, right.view(-1, *kernel)), None)
        return _pointwise(h, left, groups, len(kernel) - 1)


class ConvTranspose(Map):
    """A transposed convolution: down by a 1x1 convolution, up by a transposed one."""

    transposed, because = True, Conv.because

    def __call__(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        m = self.module
        spatial = len(m.kernel_size)
        padding = m._output_padding(
            input, output_size, m.stride, m.padding, m.kernel_size, spatial, m.dilation
        )
        return _with_bias(self, lambda bias: self._apply(input, self.weight, bias, padding))

    def low_rank(self, input: Tensor, y: Tensor, left: Tensor, right: Tensor) -> Tensor:
        m, (_, *kernel) = self.module, self.weight.shape
        spatial, groups = len(m.kernel_size), m.groups
        size = list(y.shape[-spatial:])
        padding = m._output_padding(
            input, size, m.stride, m.padding, m.kernel_size, spatial, m.dilation
        )
        if _is_costly(left, right, groups):
            return self._apply(input, (left @ right).view(self.weight.shape), None, padding)
        # (i, r) to (g r, i/g): every group has its own inputs and the same r outputs
        down = left.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        h = _pointwise(input, down, groups, spatial)
        return self._apply(h, _for_each(groups, right.view(-1, *kernel)), None, padding)

    def _apply(self, x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any) -> Tensor:
        m = self.module
        op = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(m.kernel_size) - 1]
        return op(x, weight, bias, m.stride, m.padding, padding, m.groups, m.dilation)


def _with_bias(map: Map, convolve: Callable[[Tensor | None], Tensor]) -> Tensor:
    """A convolution with the map's bias, whose gradient is had without the weight's.

    torch finds the two together, even where the weight is frozen. A 0 that is added has one alone.
    """
    bias, weight = map.bias, map.weight
    if bias is None or not bias.requires_grad or weight.requires_grad or not is_grad_enabled():
        return convolve(bias)
    y, zero = convolve(bias.detach()), bias - bias.detach()
    return y + zero.to(y.dtype).view(-1, *(1 for _ in weight.shape[2:]))


def _is_costly(left: Tensor, right: Tensor, groups: int) -> bool:
    """Whether a position takes more products by the factors, which each group has, than by W."""
    return len(left) * right.shape[1] < left.numel() + groups * right.numel()


def _for_each(groups: int, weight: Tensor) -> Tensor:
    """The weight of a convolution whose groups all have this one."""
    return weight if groups == 1 else weight.repeat(groups, *(1 for _ in weight.shape[1:]))


def _pointwise(x: Tensor, weight: Tensor, groups: int, spatial: int) -> Tensor:
    """A convolution with a kernel of one; `weight` is (o, i/g)."""
    op = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    return op(x, weight[(...,) + (None,) * spatial], groups=groups)


# a module is known by the very forward it runs, so a subclass with its own is not taken for one
_KINDS: dict[Any, type[Map]] = {
    nn.Linear.forward: Linear,
    nn.Embedding.forward: Embedding,
    nn.Conv1d.forward: Conv,
    nn.Conv2d.forward: Conv,
    nn.Conv3d.forward: Conv,
    nn.ConvTranspose1d.forward: ConvTranspose,
    nn.ConvTranspose2d.forward: ConvTranspose,
    nn.ConvTranspose3d.forward: ConvTranspose,
}


def kind_of(module: nn.Module) -> type[Map] | None:
    """The linear map that `module` applies with its `weight`, or None."""
    forward = inspect.unwrap(type(module).forward)
    if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq):
        return None  # one rewrites its weight as it reads, the other weighs whole rows' gradients
    if (forward.__module__, forward.__qualname__) == (
        "transformers.pytorch_utils",
        "Conv1D.forward",
    ):
        return TransposedLinear
    known = _KINDS.get(forward)
    return Linear if known is None and is_theirs(module) else known


def is_theirs(module: nn.Module) -> bool:
    """Whether a module is a linear map whose weight another library packed."""
    return hasattr(module, "bias") and bool(others.hidden(module)) and not _embeds(module)


def _embeds(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


_CONVS = nn.modules.conv._ConvNd
_TRANSPOSED_CONVS = nn.modules.conv._ConvTransposeNd
_RNNS = (nn.RNNBase, nn.modules.rnn.RNNCellBase)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map, as an output head is."""
    kinds = (Linear, TransposedLinear)
    return isinstance(module, nn.Linear | _CONVS) or kind_of(module) in kinds


def maps_vectors(module: nn.Module, slot: str) -> bool:
    """Whether a slot is the weight of a linear map of the last dimension, one that is called."""
    read_only = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return slot == "weight" and kind_of(module) in (Linear, TransposedLinear) and not read_only


def is_weight(module: nn.Module, slot: str) -> bool:
    """Whether a slot holds a weight that its module multiplies with, embeddings left out."""
    if slot == "weight":
        return is_linear(module) or isinstance(module, nn.Bilinear)
    if isinstance(module, nn.MultiheadAttention):
        return slot.endswith("proj_weight")
    return isinstance(module, _RNNS) and slot.startswith("weight_")


def is_transposed(module: nn.Module) -> bool:
    """Whether `module.weight` has the input as its first dimension."""
    if isinstance(module, nn.EmbeddingBag | nn.Embedding | _TRANSPOSED_CONVS):
        return True
    return kind_of(module) is TransposedLinear
