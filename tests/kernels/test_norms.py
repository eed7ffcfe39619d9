"""DoRA's norms by the factors: those of the sum, which they never form, near 0 as well."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peftlite.kernels import dora

sizes = st.integers(1, 40)


def relative(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true) / true).abs().max().item()


@given(
    stack=st.lists(st.integers(1, 3), max_size=2),
    o=sizes,
    i=sizes,
    rank=st.integers(1, 20),
    scale=st.sampled_from([1.0, 0.3]),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    entries=st.sampled_from([1, 70, 2**18]),
)
def test_is_the_reference(stack, o, i, rank, scale, transposed, dtype, entries) -> None:
    w = torch.randn(*stack, i, o).mT if transposed else torch.randn(*stack, o, i)
    w, a, b = w.to(dtype), torch.randn(*stack, rank, i), torch.randn(*stack, o, rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dora, "_ENTRIES", entries)
        found = dora.row_norms_squared(w, a, b, scale)
    w, a, b = w.double(), a.double(), b.double()
    true = dora.reference(w, a, b, scale)
    # what is left of a row where much cancels is as far off as the row is long
    terms = dora.reference(w, 0 * a, b, scale) + dora.reference(0 * w, a, b, scale)
    assert found.shape == true.shape
    bound = 1e-12 if dtype.itemsize >= 4 else 3e-6
    assert ((found - true).abs() <= bound * terms).all()


@pytest.mark.parametrize("left", [1e-1, 1e-2, 1e-3])
def test_a_row_that_nearly_cancels(left: float) -> None:
    """In fp32, ‖V‖ is as exact as V itself where BA takes a row of W away but for a `left`th."""
    torch.manual_seed(0)
    a, b = torch.randn(16, 512), torch.randn(300, 16)
    rest = torch.randn(300, 512) * left * 4  # as BA's entries are of size 4
    w = rest - b @ a
    true = dora.reference(w.double(), a.double(), b.double(), 1.0).sqrt()
    found = dora.row_norms_squared(w, a, b, 1.0).sqrt()
    assert relative(found, true) < 1e-8
    dense = dora.reference(w, a, b, 1.0).sqrt()
    assert relative(found, true) < relative(dense, true)


def test_what_cancels_wholly_is_not_below_nothing() -> None:
    a, b = torch.randn(4, 30), torch.randn(20, 4)
    assert (dora.row_norms_squared(-(b @ a), a, b, 1.0) >= 0).all()
