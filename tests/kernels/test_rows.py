"""Many deltas in one product, on a CPU: each of the ways against the reference, in fp64."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peftlite.bank.rows import Rows
from peftlite.kernels import reference
from peftlite.kernels.rows import groups_low_rank, rows_low_rank, runs_low_rank


@st.composite
def batches(draw: st.DrawFn) -> tuple[dict[str, Tensor], list[int]]:
    """A batch with the tables of its slots, views of one arena; and the slot of each row."""
    count, most = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    slots = draw(st.lists(st.integers(0, count), min_size=1, max_size=9))
    t, i, o = (draw(st.integers(1, 6)) for _ in range(3))
    make = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    arena = torch.randn(count + 1, most * (i + o), generator=make, dtype=torch.float64)
    a, b = arena.split([most * i, most * o], 1)
    a, b = a.view(-1, most, i), b.view(-1, o, most)
    ranks = torch.randint(1, most + 1, (count + 1,), generator=make)
    ranks[0] = 0
    unused = torch.arange(most) >= ranks[:, None]
    a.masked_fill_(unused[:, :, None], 0)
    b.masked_fill_(unused[:, None], 0)
    scale = torch.rand(count + 1, generator=make, dtype=torch.float64)
    x = torch.randn(len(slots), t, i, generator=make, dtype=torch.float64)
    y = torch.randn(len(slots), t, o, generator=make, dtype=torch.float64)
    return {"y": y, "x": x, "a": a, "b": b, "scale": scale, "ranks": ranks}, slots


@given(batches())
def test_every_way_is_the_reference(batch: tuple[dict[str, Tensor], list[int]]) -> None:
    its, slots = batch
    rows = Rows.of(slots)
    y, x, a, b, scale, ranks = its.values()
    true = y.clone()
    reference.rows_low_rank(true, x, a, b, scale, ranks, rows.slots)
    torch.testing.assert_close(rows_low_rank(y.clone(), x, a, b, scale, ranks, rows.slots), true)
    runs = []
    for slot, start, stop in rows.runs or ():
        r = int(ranks[slot])
        runs.append(((a[slot, :r], b[slot, :, :r], float(scale[slot])), start, stop))
    torch.testing.assert_close(runs_low_rank(y.clone(), x, runs), true)
    if runs:
        shared, padded, unpadded = rows.groups
        found = groups_low_rank(y.clone(), x, a[shared], b[shared], scale[shared], padded, unpadded)
        torch.testing.assert_close(found, true)
        base = torch.tensor(slots) == 0
        assert torch.equal(found[base], y[base])
