"""The Triton kernels of the low-rank path; `triton_ops` launches them.

Shape letters: t tokens, c columns (the inputs of x, the outputs of dY), r rank. A sum over tiles
that different programs read is left in planes of fp32, one a program, which `total` adds up in
order: so results are the same in every run. Ranks go RANK at a time, 16 or more, zeros behind them.
"""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false
import os

import triton
import triton.language as tl

# Triton's interpreter multiplies the bits of bf16 as integers
WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _mix(word):
    word = word * 0x85EBCA6B
    word = (word ^ (word >> 13)) * 0xC2B2AE35
    return word ^ (word >> 16)


@triton.jit
def keep(seed_ptr, row, first, threshold, COLUMNS: tl.constexpr):
    """The mask of `reference.keep` for rows, and COLUMNS columns from the even `first` on."""
    seed = tl.load(seed_ptr)
    pair = first // 2 + tl.arange(0, COLUMNS // 2)
    row = _mix((row.to(tl.uint32) * 0x9E3779B1) ^ seed.to(tl.uint32))
    pair = _mix((pair.to(tl.uint32) * 0x9E3779B1) ^ (seed >> 32).to(tl.uint32))
    word = _mix(row[:, None] ^ pair[None, :])
    half = tl.interleave(word & 0xFFFF, word >> 16)
    return (half ^ 0x8000).to(tl.int32) >= threshold


@triton.jit
def tile(ptr, row, column, rows, columns, row_stride, column_stride):
    """A tile of a matrix, zero beyond its end."""
    offset = row[:, None].to(tl.int64) * row_stride + column[None, :].to(tl.int64) * column_stride
    return tl.load(
        ptr + offset, mask=(row[:, None] < rows) & (column[None, :] < columns), other=0.0
    )


@triton.jit
def store(ptr, values, row, column, rows, columns, row_stride, column_stride):
    offset = row[:, None].to(tl.int64) * row_stride + column[None, :].to(tl.int64) * column_stride
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(ptr + offset, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def plain_dot(x, factor, sum):
    if WIDEN:
        x, factor = x.to(tl.float32), factor.to(tl.float32)
    return tl.dot(x, factor, sum, input_precision="ieee")


@triton.jit
def _parts(wide):
    """A number of fp32, and of bf16 the nearest and what is left of it, in fp32."""
    high = wide.to(tl.bfloat16)
    return high, wide - high.to(tl.float32)


@triton.jit
def _dot_wide(x, factor, sum):
    """sum + x·factor for an x of bf16 and a factor of fp32: the sum of three numbers of bf16."""
    high, rest = _parts(factor)
    middle, rest = _parts(rest)
    return plain_dot(x, high, plain_dot(x, middle, plain_dot(x, rest.to(tl.bfloat16), sum)))


@triton.jit
def dot(x, factor, sum):
    """sum + x·factor, with exact products: a factor of fp32 isn't rounded to the dtype of a half x.

    It is multiplied in parts: tensor cores, that wait for memory here, have the time for them, and
    x goes to them as it is.
    """
    if x.dtype == factor.dtype:
        return plain_dot(x, factor, sum)
    elif x.dtype == tl.bfloat16:
        return _dot_wide(x, factor, sum)
    else:  # fp16 hasn't the range for a factor's parts, but bf16 has the bits for two of its own
        high, rest = _parts(x.to(tl.float32))
        return _dot_wide(high, factor, _dot_wide(rest.to(tl.bfloat16), factor, sum))


@triton.jit
def half_dot(h, up, sum):
    """sum + h U, of which a half will be left: of fp32, 16 bits are multiplied."""
    if h.dtype == tl.float32:
        high, rest = _parts(h)
        up_high, up_rest = _parts(up)
        sum = plain_dot(rest.to(tl.bfloat16), up_high, sum)
        return plain_dot(high, up_high, plain_dot(high, up_rest.to(tl.bfloat16), sum))
    else:
        return plain_dot(h, up, sum)


@triton.jit
def block_and_rank(rank, RANK: tl.constexpr):
    """Which block and which ranks a program has; those that share a block run together."""
    parts = tl.cdiv(rank, RANK)
    return tl.program_id(0) // parts, tl.program_id(0) % parts * RANK + tl.arange(0, RANK)


@triton.jit
def shrink(
    x_ptr, a_ptr, h_ptr, seed_ptr, threshold, scale,
    tokens, columns, rank, x_row, x_column, a_row, a_column,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """h = s·drop(x) Aᵀ, (splits, t, r): every split has its tiles of the columns."""
    block, r = block_and_rank(rank, RANK)
    split, splits = tl.program_id(1), tl.num_programs(1)
    t = block * TOKENS + tl.arange(0, TOKENS)
    h = tl.zeros((TOKENS, RANK), tl.float32)
    for first in range(split * COLUMNS, columns, splits * COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        x = tile(x_ptr, t, c, tokens, columns, x_row, x_column)
        if DROP:
            x = tl.where(keep(seed_ptr, t, first, threshold, COLUMNS), x, 0.0)
        h = dot(x, tile(a_ptr, c, r, columns, rank, a_column, a_row), h)
    store(h_ptr + split.to(tl.int64) * tokens * rank, h * scale, t, r, tokens, rank, rank, 1)


@triton.jit
def grad_ab(
    dy_ptr, h_ptr, b_ptr, dh_ptr, db_ptr, scale,
    tokens, columns, rank, dy_row, dy_column, h_row, h_column, b_row, b_column,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """dh = s·dY B, (blocks of columns, t, r), and dB = dYᵀ h, (splits, c, r), in one read of dY."""
    block, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c, r = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    b = tile(b_ptr, c, r, columns, rank, b_row, b_column)
    db = tl.zeros((COLUMNS, RANK), tl.float32)
    dh_ptr += block.to(tl.int64) * tokens * rank
    for first in range(split * TOKENS, tokens, splits * TOKENS):
        t = first + tl.arange(0, TOKENS)
        dy = tile(dy_ptr, t, c, tokens, columns, dy_row, dy_column)
        dh = dot(dy, b, tl.zeros((TOKENS, RANK), tl.float32))
        store(dh_ptr, dh * scale, t, r, tokens, rank, rank, 1)
        db = dot(tl.trans(dy), tile(h_ptr, t, r, tokens, rank, h_row, h_column), db)
    store(db_ptr + split.to(tl.int64) * columns * rank, db, c, r, columns, rank, rank, 1)


@triton.jit
def grad_a(
    dh_ptr, x_ptr, da_ptr, seed_ptr, threshold,
    tokens, columns, rank, dh_row, dh_column, x_row, x_column,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """dA = dhᵀ drop(x), (splits, r, c): every split has its tiles of the tokens."""
    block, r = block_and_rank(rank, RANK)
    split, splits = tl.program_id(1), tl.num_programs(1)
    start = block * COLUMNS
    c = start + tl.arange(0, COLUMNS)
    da = tl.zeros((COLUMNS, RANK), tl.float32)
    for first in range(split * TOKENS, tokens, splits * TOKENS):
        t = first + tl.arange(0, TOKENS)
        x = tile(x_ptr, t, c, tokens, columns, x_row, x_column)
        if DROP:
            x = tl.where(keep(seed_ptr, t, start, threshold, COLUMNS), x, 0.0)
        da = dot(tl.trans(x), tile(dh_ptr, t, r, tokens, rank, dh_row, dh_column), da)
    store(da_ptr + split.to(tl.int64) * rank * columns, da, c, r, columns, rank, 1, columns)


@triton.jit
def low_rank(
    h_ptr, up_ptr, bias_ptr, seed_ptr, threshold, t, start,
    tokens, columns, rank, h_row, h_column, up_row, up_column,
    COLUMNS: tl.constexpr, RANK: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """A tile of h U + bias, or drop(h U), of which a half will be left."""
    c = start + tl.arange(0, COLUMNS)
    y = tl.zeros((t.shape[0], COLUMNS), tl.float32)
    for first in range(0, rank, RANK):
        r = first + tl.arange(0, RANK)
        h = tile(h_ptr, t, r, tokens, rank, h_row, h_column)
        up = tile(up_ptr, r, c, rank, columns, up_row, up_column)
        y = half_dot(h, up, y)
    if DROP:
        y = tl.where(keep(seed_ptr, t, start, threshold, COLUMNS), y, 0.0)
    if BIAS:
        y += tl.load(bias_ptr + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def expand(
    h_ptr, up_ptr, bias_ptr, y_ptr, seed_ptr, threshold,
    tokens, columns, rank, h_row, h_column, up_row, up_column, y_row, y_column,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    BIAS: tl.constexpr, DROP: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """h U + bias, or drop(h U), (t, c); or that added to what is there."""
    t, start = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1) * COLUMNS
    c = start + tl.arange(0, COLUMNS)
    y = low_rank(
        h_ptr, up_ptr, bias_ptr, seed_ptr, threshold, t, start,
        tokens, columns, rank, h_row, h_column, up_row, up_column,
        COLUMNS, RANK, BIAS, DROP,
    )  # fmt: skip
    if ADD:
        y += tile(y_ptr, t, c, tokens, columns, y_row, y_column).to(tl.float32)
    store(y_ptr, y, t, c, tokens, columns, y_row, y_column)


@triton.jit
def total(planes_ptr, sum_ptr, planes, numbers, NUMBERS: tl.constexpr):
    """The sum of the planes, in order."""
    offset = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    sum = tl.zeros((NUMBERS,), tl.float32)
    for _ in range(planes):
        sum += tl.load(planes_ptr + offset, mask=offset < numbers, other=0.0)
        planes_ptr += numbers
    tl.store(sum_ptr + offset, sum.to(sum_ptr.dtype.element_ty), mask=offset < numbers)
