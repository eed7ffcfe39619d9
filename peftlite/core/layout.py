"""Layout: how a weight lies in its tensor, as matrices of outputs by inputs.

    nn.Linear, attention, RNNs     (o, i)
    the Conv1D of GPT-2            (i, o)               transposed
    nn.Embedding                   (i, o)               transposed, its rows looked up
    convolutions                   (o, i/g, *taps)      one matrix, (o, i/g·taps)
    transposed convolutions        (i, o/g, *taps)      one matrix, (i, o/g·taps), transposed
    experts, nn.Bilinear, …        (*stack, o, i)       a stack of matrices

Methods speak of matrices (*stack, o, i), of factors A (*stack, r, i) and B (*stack, o, r), and of
vectors with a number for each output or each input; a layout says what those are in the tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.maps import is_transposed

_CONVS = nn.modules.conv._ConvNd
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Layout:
    """How a tensor of two dimensions or more, or a part of one, is made of matrices.

    Attributes:
        shape: the tensor's.
        transposed: whether its first dimension is the inputs.
        embeds: whether its rows are looked up instead of multiplied.
        joined: whether all dimensions behind the first make up one, as in a convolution's kernel.
        groups: g, of a convolution; 1 for a part, and anywhere else.
    """

    shape: torch.Size
    transposed: bool = False
    embeds: bool = False
    joined: bool = False
    groups: int = 1

    @classmethod
    def of(cls, module: Any, slot: str, shape: torch.Size, part: bool) -> Layout:
        """The layout of a module's tensor, or of a part of it that has this shape."""
        weight, conv = slot == "weight", isinstance(module, _CONVS)
        return cls(
            shape,
            transposed=weight and is_transposed(module),
            embeds=weight and isinstance(module, _EMBEDDINGS),
            joined=conv,
            groups=module.groups if conv and not part else 1,
        )

    # -- matrices

    @property
    def stack(self) -> tuple[int, ...]:
        """How many matrices there are, as the leading dimensions; () for one."""
        return () if self.joined else tuple(self.shape[:-2])

    @property
    def rows(self) -> int:
        """The rows of a matrix as it is stored."""
        return self.shape[0] if self.joined else self.shape[-2]

    @property
    def columns(self) -> int:
        """The columns of a matrix as it is stored."""
        return math.prod(self.shape[1:]) if self.joined else self.shape[-1]

    @property
    def taps(self) -> int:
        """The entries of a convolution's kernel; 1 without one."""
        return math.prod(self.shape[2:]) if self.joined else 1

    @property
    def o(self) -> int:
        """The outputs of a matrix."""
        return self.columns if self.transposed else self.rows

    @property
    def i(self) -> int:
        """The inputs of a matrix."""
        return self.rows if self.transposed else self.columns

    def matrices(self, w: Tensor) -> Tensor:
        """The matrices (*stack, o, i) of a tensor."""
        w = w.reshape(*self.stack, self.rows, self.columns)
        return w.mT if self.transposed else w

    def add(self, w: Tensor, change: Tensor, scale: float = 1.0) -> Tensor:
        """W + s·ΔW for a change of its matrices (*stack, o, i), rounded once to W's dtype."""
        change = change.mT if self.transposed else change
        return torch.add(w, change.reshape(w.shape), alpha=scale).to(w.dtype)

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """B (*stack, o, r) and A (*stack, r, i) as `left @ right` in the tensor's own order."""
        return (a.mT, b.mT) if self.transposed else (b, a)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """BA, of A (*stack, r, i) and B (*stack, o, r), in the shape of the tensor."""
        left, right = self.factors(a, b)
        return (left @ right).reshape(self.shape)

    # -- vectors

    def dim(self, inputs: bool) -> int:
        """Which of the two dimensions of a matrix the outputs, or the inputs, lie along."""
        return int(inputs is not self.transposed)

    def vector(self, inputs: bool = False) -> tuple[int, ...]:
        """The shape of a vector with a number for each output, or input, of each matrix."""
        if self.joined or len(self.shape) == 1:
            return (self.shape[0] if self._first(inputs) else self.groups * self.shape[1],)
        return (*self.stack, self.i if inputs else self.o)

    def scaled(self, w: Tensor, by: Tensor, inputs: bool = False) -> Tensor:
        """W times a vector, (*stack, o) or, of the inputs, (*stack, i): a number for each."""
        if self._first(inputs):
            return w * by.view(*by.shape, *(1 for _ in w.shape[by.dim() :]))
        if not self.joined:
            return w * by[..., None, :]
        # a group's second dimension is its own
        taps = (1 for _ in w.shape[2:])
        grouped = w.unflatten(0, (self.groups, -1))
        return (grouped * by.view(self.groups, 1, -1, *taps)).flatten(0, 1)

    def _first(self, inputs: bool) -> bool:
        return inputs is self.transposed

    # -- neurons: all the weights of one output, a kernel's taps included; of an embedding, one row

    @property
    def neuron(self) -> int:
        """How many weights a neuron has."""
        if self._regroups:
            return self.shape[0] // self.groups * math.prod(self.shape[2:])
        return self.columns

    def neurons(self, w: Tensor) -> Tensor:
        """The neurons (*stack, n, d) of a tensor, as rows."""
        if self._regroups:
            w = w.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return w.reshape(*self.stack, -1, self.neuron)

    def from_neurons(self, rows: Tensor) -> Tensor:
        """The tensor whose neurons (*stack, n, d) are these rows."""
        if not self._regroups:
            return rows.reshape(self.shape)
        first, second, *taps = self.shape
        grouped = rows.reshape(self.groups, second, first // self.groups, *taps)
        return grouped.transpose(1, 2).flatten(0, 1)

    @property
    def _regroups(self) -> bool:
        """Whether a neuron lies across the first dimension."""
        return self.transposed and not self.embeds
