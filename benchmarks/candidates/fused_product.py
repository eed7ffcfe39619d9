"""x W + h U + bias as one product on a GPU, which writes y once and never reads it.

It has to come within a few percent of cuBLAS's product to win: what it saves is a write and a read
of y. Where `primitives.py` says that it does, it belongs into `triton_ops.product`.
"""

# pyright: reportMissingParameterType=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from peftlite.kernels.triton.kernels import low_rank, plain_dot, store
from peftlite.kernels.triton.launch import cdiv, launch, mask

Config = dict[str, int]

RANK = 16  # at a time: registers are short beside a tile of y

CONFIGS: tuple[Config, ...] = (
    {"TOKENS": 128, "COLUMNS": 256, "INPUTS": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3},
    {"TOKENS": 128, "COLUMNS": 128, "INPUTS": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3},
    {"TOKENS": 64, "COLUMNS": 128, "INPUTS": 64, "GROUP": 8, "num_warps": 4, "num_stages": 4},
)


@triton.jit
def _product(
    x_ptr, w_ptr, h_ptr, up_ptr, bias_ptr, y_ptr, seed_ptr, threshold,
    tokens, columns, inputs, rank,
    x_row, x_column, w_row, w_column, h_row, h_column, up_row, up_column,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, RANK: tl.constexpr,
    GROUP: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """x W + h U + bias, or x W + drop(h U), (t, c): a sum that begins with what `expand` writes."""
    # programs run by groups of rows of blocks, whose tiles of x and W the cache then holds
    across = tl.cdiv(columns, COLUMNS)
    group, within = tl.program_id(0) // (GROUP * across), tl.program_id(0) % (GROUP * across)
    high = tl.minimum(tl.cdiv(tokens, TOKENS) - group * GROUP, GROUP)
    t = (group * GROUP + within % high) * TOKENS + tl.arange(0, TOKENS)
    start = within // high * COLUMNS
    c, i = start + tl.arange(0, COLUMNS), tl.arange(0, INPUTS)
    y = low_rank(
        h_ptr, up_ptr, bias_ptr, seed_ptr, threshold, t, start,
        tokens, columns, rank, h_row, h_column, up_row, up_column,
        COLUMNS, RANK, BIAS, DROP,
    )  # fmt: skip
    # rows beyond the end read the first ones, and nothing of theirs is stored
    x_ptr += (t % tokens)[:, None].to(tl.int64) * x_row + i[None, :].to(tl.int64) * x_column
    w_ptr += i[:, None].to(tl.int64) * w_row + (c % columns)[None, :].to(tl.int64) * w_column
    for first in range(0, inputs, INPUTS):
        x = tl.load(x_ptr, mask=i[None, :] < inputs - first, other=0.0)
        w = tl.load(w_ptr, mask=i[:, None] < inputs - first, other=0.0)
        y = plain_dot(x, w, y)
        x_ptr += INPUTS * x_column
        w_ptr += INPUTS * w_row
    store(y_ptr, y, t, c, tokens, columns, columns, 1)


def product(
    x: Tensor,
    w: Tensor,
    h: Tensor,
    up: Tensor,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    config: Config,
) -> Tensor:
    """x W + h U + bias, or x W + drop(h U), for x (t, i), W (i, c), h (t, r) and U (r, c)."""
    (tokens, inputs), (rank, columns) = x.shape, up.shape
    y = x.new_empty(tokens, columns)
    blocks = cdiv(tokens, config["TOKENS"]) * cdiv(columns, config["COLUMNS"])
    launch(
        _product, (blocks,), x, w, h, up, y if bias is None else bias, y,
        *mask(x, dropout, seed),
        tokens, columns, inputs, rank, *x.stride(), *w.stride(), *h.stride(), *up.stride(),
        RANK=RANK,
        BIAS=bias is not None, DROP=dropout > 0, **config,
    )  # fmt: skip
    return y
