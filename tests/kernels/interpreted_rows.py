"""Row-mixed products against their reference: interpreted without a GPU, or on one.

TRITON_INTERPRET=1 pytest tests/kernels/interpreted_rows.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftlite.kernels import reference
from peftlite.kernels.triton import rows as triton_rows
from tests.kernels.against import assert_close
from tests.kernels.interpreted import DEVICE, Dtypes, dtypes, some

HOLE = float("nan")  # where nothing may be read


def arena(slots: int, most: int, i: int, o: int, dtype: torch.dtype):
    """A and B as views of one buffer, and the ranks of the slots: nothing holds beyond them."""
    flat = torch.full((slots, most * (i + o) + 3), HOLE, device=DEVICE, dtype=dtype)
    a = flat[:, : most * i].view(slots, most, i)
    b = flat[:, most * i : most * (i + o)].view(slots, o, most)
    ranks = torch.randint(0, most + 1, (slots, 3), dtype=torch.int32)[:, 1]
    for slot, rank in enumerate(ranks.tolist()):
        if slot:
            a[slot, :rank] = torch.randint(1, 65, (rank, i), device=DEVICE) / 64
            b[slot, :, :rank] = torch.randint(1, 65, (o, rank), device=DEVICE) / 64
    return a, b, ranks.to(DEVICE)


@some
@given(
    shape=st.sampled_from([(0,), (1,), (5,), (40,), (3, 2), (2, 33), (3, 30), (5, 3, 9)]),
    slots=st.integers(1, 6),
    most=st.one_of(st.sampled_from([8, 16]), st.integers(1, 80)),
    i=st.integers(1, 300),
    o=st.integers(1, 200),
    dtypes=dtypes,
    turned=st.booleans(),
)
def test_rows(
    shape: tuple[int, ...], slots: int, most: int, i: int, o: int, dtypes: Dtypes, turned: bool
) -> None:
    dtype, factor = dtypes
    a, b, ranks = arena(slots, most, i, o, factor)
    x = torch.randint(1, 65, (*shape, i), device=DEVICE).to(dtype) / 64
    y = torch.randint(1, 65, (*shape, o), device=DEVICE).to(dtype)
    if turned:  # as a model's that has its tokens first
        x, y = (z.transpose(0, -2).contiguous().transpose(0, -2) for z in (x, y))
    scale = (torch.rand(slots, 2, device=DEVICE) + 0.5)[:, 1]
    chosen = torch.randint(0, slots, shape[:1], dtype=torch.int32, device=DEVICE)
    true, before = y.double(), y.clone()
    reference.rows_low_rank(true, x.double(), a.double(), b.double(), scale.double(), ranks, chosen)
    triton_rows.rows_low_rank(y, x, a, b, scale, ranks, chosen)
    assert torch.equal(y[chosen == 0], before[chosen == 0])
    assert_close({"y": y}, {"y": true})


def test_rows_are_alike_in_every_run() -> None:
    a, b, ranks = arena(4, 16, 700, 60, torch.bfloat16)
    x, y = torch.randn(20, 700, device=DEVICE).bfloat16(), torch.zeros(2, 20, 60, device=DEVICE)
    slots = torch.randint(0, 4, (20,), dtype=torch.int32, device=DEVICE)
    first, second = y.bfloat16()
    for out in (first, second):
        triton_rows.rows_low_rank(out, x, a, b, torch.ones(4, device=DEVICE), ranks, slots)
    assert torch.equal(first, second) and first.any()


@pytest.mark.skipif(DEVICE == "cpu", reason="captures a CUDA graph")
def test_a_graph_replays_for_any_mix() -> None:
    a, b, ranks = arena(5, 16, 256, 128, torch.bfloat16)
    x, y = torch.randn(8, 256, device=DEVICE).bfloat16(), torch.zeros(8, 128, device=DEVICE)
    scale, slots = torch.ones(5, device=DEVICE), torch.zeros(8, dtype=torch.int32, device=DEVICE)
    y = y.bfloat16()
    triton_rows.rows_low_rank(y, x, a, b, scale, ranks, slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton_rows.rows_low_rank(y.zero_(), x, a, b, scale, ranks, slots)
    for mix in ([1, 2, 3, 4, 0, 1, 2, 3], [4] * 8):
        slots.copy_(torch.tensor(mix))
        graph.replay()
        true = torch.zeros_like(y)
        triton_rows.rows_low_rank(true, x, a, b, scale, ranks, slots)
        assert torch.equal(y, true)
