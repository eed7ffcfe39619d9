"""Convolutions: y = W∗x + s_k·B_k∗(A_k∗x), with k the slot of the row.

The rows of a batch are groups of channels of one convolution, each with its own small kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlite.bank.families.gather import slots_of
from peftlite.bank.families.low_rank import MixedLowRank
from peftlite.bank.rows import Rows, Tables
from peftlite.core.maps import Map, kind_of, unwrap
from peftlite.core.site import Site
from peftlite.errors import PeftliteError, TargetError


class MixedConv(MixedLowRank):
    """`a` (R, i/g·kernel) and `b` (o, R): down by a convolution, up at each place."""

    @staticmethod
    def suits(site: Site) -> None:
        if len({kind_of(module) for module, _ in site.owners}) > 1:
            raise TargetError(
                f"{site.address} is of maps of several kinds, so its rows can't be told apart: "
                "leave it out of the bank's methods with exclude="
            )

    def mix(
        self, rows: Rows, tables: Tables, inner: Map, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        y = inner(input, *args, **kwargs)
        if y.dim() == inner.weight.dim() - 1:
            raise PeftliteError(
                f"{self.address} is called with {tuple(input.shape)}, in which rows can't be told "
                "apart: give it a dimension for them, as x[None]"
            )
        slots = slots_of(rows, len(input))
        a, b, scale = (tables[name].index_select(0, slots) for name in ("a", "b", "scale"))
        x = self.dropped(input, tables, slots)
        a = a * scale[:, None, None].to(a.dtype)
        return y + self.change(unwrap(inner)[0], x.to(a.dtype), y, a, b).to(y.dtype)

    def change(self, base: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """B∗(A∗x) of every row, for A (n, r, i/g·kernel) and B (n, o, r)."""
        m, groups = base.module, len(x) * base.module.groups
        down = a.unflatten(2, base.weight.shape[1:])[:, None]  # each group has the same
        down = down.expand(-1, m.groups, *down.shape[2:]).flatten(0, 2)
        padding = m.padding
        if m.padding_mode != "zeros":
            x, padding = F.pad(x, m._reversed_padding_repeated_twice, m.padding_mode), 0
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(m.kernel_size) - 1]
        rows_as_channels = x.reshape(1, -1, *x.shape[2:])
        h = convolve(rows_as_channels, down, None, m.stride, padding, m.dilation, groups)
        h = h.reshape(groups, a.shape[1], -1)
        return torch.bmm(b.reshape(groups, -1, b.shape[2]), h).view_as(y)


class MixedConvTranspose(MixedConv):
    """`a` (R, i) and `b` (o/g·kernel, R): down at each place, up by a transposed convolution."""

    def change(self, base: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        m, groups, spatial = base.module, len(x) * base.module.groups, x.dim() - 2
        size = m._output_padding(
            x, list(y.shape[2:]), m.stride, m.padding, m.kernel_size, spatial, m.dilation
        )
        down = a.unflatten(2, (m.groups, -1)).transpose(1, 2).flatten(0, 1)  # (n·g, r, i/g)
        h = torch.bmm(down, x.reshape(groups, down.shape[2], -1)).view(1, -1, *x.shape[2:])
        up = b.mT.unflatten(2, base.weight.shape[1:])[:, None]  # each group has the same
        up = up.expand(-1, m.groups, *up.shape[2:]).flatten(0, 2)
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
        return convolve(h, up, None, m.stride, m.padding, size, groups, m.dilation).view_as(y)
