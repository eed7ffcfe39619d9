"""The Triton kernels of the low-rank path; `triton_ops` launches them.

Shape letters: t tokens, c columns (the inputs of x, the outputs of dY), r rank. A sum over tiles
that different programs read is left in planes of fp32, one a program, which are added up in order:
so results are the same in every run. `rank` is padded to RANK, at least 16, with zeros.
"""

# pyright: reportMissingParameterType=false
import triton
import triton.language as tl


@triton.jit
def _mix(word):
    word = word * 0x85EBCA6B
    word = (word ^ (word >> 13)) * 0xC2B2AE35
    return word ^ (word >> 16)


@triton.jit
def _keep(seed_ptr, row, first, threshold, COLUMNS: tl.constexpr):
    """The mask of `reference.keep` for rows, and COLUMNS columns from the even `first` on."""
    seed = tl.load(seed_ptr)
    pair = first // 2 + tl.arange(0, COLUMNS // 2)
    row = _mix((row.to(tl.uint32) * 0x9E3779B1) ^ seed.to(tl.uint32))
    pair = _mix((pair.to(tl.uint32) * 0x9E3779B1) ^ (seed >> 32).to(tl.uint32))
    word = _mix(row[:, None] ^ pair[None, :])
    half = tl.interleave(word & 0xFFFF, word >> 16)
    return (half ^ 0x8000).to(tl.int32) >= threshold


@triton.jit
def _tile(ptr, row, column, rows, columns, row_stride, column_stride, WIDEN: tl.constexpr):
    """A tile of a matrix, zero beyond its end; in fp32 where bf16 can't be multiplied."""
    at = ptr + row[:, None].to(tl.int64) * row_stride + column[None, :] * column_stride
    tile = tl.load(at, mask=(row[:, None] < rows) & (column[None, :] < columns), other=0.0)
    return tile.to(tl.float32) if WIDEN else tile


@triton.jit
def _store(ptr, tile, row, column, rows, columns):
    """Stores a tile of a contiguous matrix."""
    at = ptr + row[:, None].to(tl.int64) * columns + column[None, :]
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def shrink(
    x_ptr, a_ptr, h_ptr, seed_ptr, threshold,
    tokens, columns, rank, x_row, x_column, a_row, a_column,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    DROP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """h = drop(x) Aᵀ, (splits, t, r): every split has its tiles of the columns."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    t, r = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, RANK)
    h = tl.zeros((TOKENS, RANK), tl.float32)
    for first in range(split * COLUMNS, columns, splits * COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        x = _tile(x_ptr, t, c, tokens, columns, x_row, x_column, WIDEN)
        if DROP:
            x = tl.where(_keep(seed_ptr, t, first, threshold, COLUMNS), x, 0.0)
        a = _tile(a_ptr, c, r, columns, rank, a_column, a_row, WIDEN)
        h = tl.dot(x, a, h, input_precision="ieee")
    _store(h_ptr + split.to(tl.int64) * tokens * rank, h, t, r, tokens, rank)


@triton.jit
def grad_ab(
    dy_ptr, h_ptr, b_ptr, dh_ptr, db_ptr,
    tokens, columns, rank, dy_row, dy_column, h_row, h_column, b_row, b_column,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dh = dY B, (blocks of columns, t, r), and dB = dYᵀ h, (splits, c, r), in one read of dY."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    block = tl.program_id(0)
    c, r = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    b = _tile(b_ptr, c, r, columns, rank, b_row, b_column, WIDEN)
    db = tl.zeros((COLUMNS, RANK), tl.float32)
    for first in range(split * TOKENS, tokens, splits * TOKENS):
        t = first + tl.arange(0, TOKENS)
        dy = _tile(dy_ptr, t, c, tokens, columns, dy_row, dy_column, WIDEN)
        h = _tile(h_ptr, t, r, tokens, rank, h_row, h_column, WIDEN)
        dh = tl.dot(dy, b, input_precision="ieee")
        _store(dh_ptr + block.to(tl.int64) * tokens * rank, dh, t, r, tokens, rank)
        db = tl.dot(tl.trans(dy), h, db, input_precision="ieee")
    _store(db_ptr + split.to(tl.int64) * columns * rank, db, c, r, columns, rank)


@triton.jit
def grad_a(
    dh_ptr, x_ptr, da_ptr, seed_ptr, threshold,
    tokens, columns, rank, dh_row, dh_column, x_row, x_column,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    DROP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dA = dhᵀ drop(x), (splits, r, c): every split has its tiles of the tokens."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    start = tl.program_id(0) * COLUMNS
    c, r = start + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    da = tl.zeros((RANK, COLUMNS), tl.float32)
    for first in range(split * TOKENS, tokens, splits * TOKENS):
        t = first + tl.arange(0, TOKENS)
        x = _tile(x_ptr, t, c, tokens, columns, x_row, x_column, WIDEN)
        if DROP:
            x = tl.where(_keep(seed_ptr, t, start, threshold, COLUMNS), x, 0.0)
        dh = _tile(dh_ptr, r, t, rank, tokens, dh_column, dh_row, WIDEN)
        da = tl.dot(dh, x, da, input_precision="ieee")
    _store(da_ptr + split.to(tl.int64) * rank * columns, da, r, c, rank, columns)


@triton.jit
def expand(
    h_ptr, up_ptr, y_ptr, seed_ptr, threshold,
    tokens, columns, rank, h_row, h_column, up_row, up_column,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """drop(h U), (t, c)."""
    start = tl.program_id(1) * COLUMNS
    t, c = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), start + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    h = _tile(h_ptr, t, r, tokens, rank, h_row, h_column, WIDEN)
    up = _tile(up_ptr, r, c, rank, columns, up_row, up_column, WIDEN)
    y = tl.dot(h, up, input_precision="ieee")
    y = tl.where(_keep(seed_ptr, t, start, threshold, COLUMNS), y, 0.0)
    _store(y_ptr, y, t, c, tokens, columns)
