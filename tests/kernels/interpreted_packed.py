"""NF4 in Triton against plain torch: interpreted without a GPU, or on one.

TRITON_INTERPRET=1 pytest tests/kernels/interpreted_packed.py
"""

import torch
from hypothesis import given
from hypothesis import strategies as st

import peftlite as pl
from peftlite import kernels
from peftlite.kernels.triton import packed as triton_packed
from peftlite.quant import nf4
from tests.kernels.against import assert_close
from tests.kernels.interpreted import DEVICE, some

TABLES = nf4.levels().to(DEVICE), nf4.dynamic_map().to(DEVICE)
blocks, halves = st.sampled_from([32, 64, 4096]), [torch.bfloat16, torch.float16]
dtypes = st.sampled_from([*halves, torch.float32])


def packed(shape: tuple[int, ...], block: int, double: bool):
    """Parts on the device, and what they are, in fp32, by plain torch."""
    parts = nf4.pack(torch.randn(shape), block, double)
    w = nf4.unpack(parts, block, torch.empty(shape))
    return {name: part.to(DEVICE) for name, part in parts.items()}, w


@some
@given(n=st.integers(1, 9000), block=blocks, double=st.booleans(), dtype=dtypes)
def test_unpack(n: int, block: int, double: bool, dtype: torch.dtype) -> None:
    parts, w = packed((n,), block, double)
    out = torch.full((n,), torch.nan, device=DEVICE, dtype=dtype)
    triton_packed.unpack(parts, *TABLES, block, out)
    if dtype is torch.bfloat16 and DEVICE == "cpu":  # the interpreter cuts its bits off
        assert torch.equal(out, (w.view(torch.int32) & -65536).view(torch.float32).bfloat16())
    else:
        assert torch.equal(out.cpu(), w.to(dtype))


@some
@given(
    shape=st.sampled_from([(1,), (), (3, 1), (8,)]),
    o=st.integers(1, 40),
    each=st.integers(1, 20),
    block=blocks,
    options=st.tuples(st.booleans(), st.booleans()),
    dtype=dtypes,
)
def test_product(
    shape: tuple[int, ...],
    o: int,
    each: int,
    block: int,
    options: tuple[bool, bool],
    dtype: torch.dtype,
) -> None:
    (biased, double), i = options, block * min(each, 8192 // block)
    parts, w = packed((o, i), block, double)
    x = torch.randn(*shape, i, device=DEVICE).to(dtype)
    bias = torch.randn(o, device=DEVICE).to(dtype) if biased else None
    y = triton_packed.product(x, parts, *TABLES, block, bias)
    true = x.double() @ w.to(DEVICE).double().t()
    assert y is not None
    assert_close({"y": y}, {"y": true if bias is None else true + bias})


def test_a_packed_layer_takes_it() -> None:
    layer = torch.nn.Linear(64, 12, device=DEVICE)
    pl.quantize(layer, targets="*")
    x = torch.randn(3, 64, device=DEVICE)
    y = layer(x)
    with kernels.backend("reference"):
        true = layer(x)
    with kernels.backend("triton"):
        assert_close({"y": layer(x)}, {"y": true})
        with torch.no_grad():  # by the codes themselves
            assert_close({"y": layer(x)}, {"y": true})
    assert_close({"y": y}, {"y": true})


def test_what_has_no_few_rows_is_left_to_others() -> None:
    parts, _ = packed((4, 96), 64, True)
    one, many = (torch.randn(rows, 96, device=DEVICE) for rows in (1, triton_packed.FEW + 1))
    assert triton_packed.product(one, parts, *TABLES, 64, None) is None
    assert triton_packed.product(many, parts, *TABLES, 32, None) is None
    assert triton_packed.product(one, parts | {"left": one}, *TABLES, 32, None) is None
