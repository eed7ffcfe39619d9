"""y = x W'ᵀ + bias, where W' is W but for a few entries that have values added to them.

W' is formed a block at a time, for y and once more for dx, and nothing of its size is kept. The
gradient of the values is some entries of dYᵀ x; while they are few, no others are formed.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlite.kernels import dispatch
from peftlite.kernels.linear import differentiable, matrix

# on a CPU; with less at a time the products are slower, with more it no longer fits into a cache
_BYTES = 2**23  # of W' that are formed at a time
_TOKENS = 256  # whose part in the values' gradient is found at a time


def sparse_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    transposed: bool = False,
) -> Tensor:
    """y = x W'ᵀ + bias for x (..., i) and W (o, i); or y = x W' + bias for a `transposed` W (i, o).

    W' is W with `values` (n) added at the entries `indices` (n): flat, each once, in order.
    """
    if torch.compiler.is_compiling() or dispatch.by_autograd(x):
        return reference(x, w, bias, values, indices, transposed)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif x.dtype is not w.dtype or not dispatch.is_plain_weight(w):
        return reference(x, w, bias, values, indices, transposed)
    return _SparseLinear.apply(x, w, bias, values, indices, transposed)


def reference(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    transposed: bool = False,
) -> Tensor:
    """`sparse_linear` in plain torch: x (..., i), values (n) at flat indices (n)."""
    w = added(w, values, indices)
    return F.linear(x, w.t() if transposed else w, bias)


def added(w: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """W with values (n) added at flat indices (n), rounded once to its dtype."""
    entries = torch.unravel_index(indices, w.shape)
    return w.index_put(entries, (w[entries] + values).to(w.dtype))


def grad_values(u: Tensor, v: Tensor, indices: Tensor) -> Tensor:
    """The entries of uᵀ v at flat indices (n), in order, for u (t, i) and v (t, o)."""
    rows, columns = u.shape[1], v.shape[1]
    triton = dispatch.path_with(u, u.dtype) == "triton"
    if len(indices) > _few(u, triton) * rows * columns:
        return (u.t() @ v).flatten()[indices]
    if triton:
        from peftlite.kernels.triton import sparse as triton_sparse

        return triton_sparse.grad_values(u, v, indices)
    ends = torch.arange(rows + 1, device=u.device) * columns
    crows = torch.searchsorted(indices.to(torch.int64), ends).to(indices.dtype)
    sums = u.new_zeros(len(indices), dtype=torch.promote_types(u.dtype, torch.float32))
    for parts in zip(u.split(_TOKENS), v.split(_TOKENS), strict=True):
        # torch would transpose them itself, and more slowly
        transposed = (part.t().contiguous().to(sums.dtype) for part in parts)
        sums = _sampled(crows, indices % columns, sums, *transposed)
    return sums


def _few(u: Tensor, triton: bool) -> float:
    """The density below which some entries of a product take less time than all."""
    if not u.is_cpu:
        return 0.005 if triton else 0.0
    return 0.07 if u.dtype.itemsize < 4 else 0.15


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, w, bias, values, indices, ctx.transposed = inputs
        ctx.save_for_backward(x, w, bias, values, indices)
        return _times(x, w, values, indices, not ctx.transposed, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (*tensors, indices) = grad_outputs, ctx.saved_tensors
        x, w, _, values = tensors
        if torch.is_grad_enabled():

            def call(x: Tensor, w: Tensor, bias: Tensor | None, values: Tensor) -> Tensor:
                return reference(x, w.to(x.dtype), bias, values, indices, ctx.transposed)

            return differentiable(call, tensors, ctx.needs_input_grad, grad)
        for_x, for_w, for_bias, for_values, *_ = ctx.needs_input_grad
        flat, dy = matrix(x), matrix(grad)
        u, v = (flat, dy) if ctx.transposed else (dy, flat)
        dx = _times(grad, w, values, indices, ctx.transposed) if for_x else None
        dw = u.t() @ v if for_w else None
        dbias = dy.sum(0) if for_bias else None
        return dx, dw, dbias, grad_values(u, v, indices) if for_values else None, None, None


def _times(
    x: Tensor, w: Tensor, values: Tensor, indices: Tensor, by_rows: bool, bias: Tensor | None = None
) -> Tensor:
    """x W'ᵀ + bias, some rows of W' at a time; or x W' + bias, some of its columns at a time."""
    flat, dim = matrix(x), 0 if by_rows else 1
    y = flat.new_empty(len(flat), w.shape[dim])
    for outputs, part in _blocks(w, values, indices, dim):
        part = part.to(x.dtype)
        factor, to = part.t() if by_rows else part, y[:, outputs]
        if bias is None:
            torch.mm(flat, factor, out=to)
        else:
            torch.addmm(bias[outputs].to(x.dtype), flat, factor, out=to)
    # no view to autograd, so that it may be changed in place
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], w.shape[dim]))


def _blocks(w: Tensor, values: Tensor, indices: Tensor, dim: int) -> Iterator[tuple[slice, Tensor]]:
    """W' along a dimension, a part at a time; on other devices than a CPU in one part."""
    size, entries = w.shape[dim], torch.unravel_index(indices, w.shape)
    step = max(_BYTES // (w.shape[1 - dim] * w.itemsize), 1) if w.is_cpu else size
    memory = w.new_empty(min(step, size) * w.shape[1 - dim])
    for start in range(0, size, step):
        of_w = w.narrow(dim, start, min(step, size - start))
        part = memory[: of_w.numel()].view(of_w.shape).copy_(of_w)
        (row, column), changes = entries, values
        if step < size:
            inside = ((entries[dim] >= start) & (entries[dim] < start + step)).nonzero()[:, 0]
            row, column, changes = row[inside], column[inside], values[inside]
        own = (row - start, column) if dim == 0 else (row, column - start)
        part[own] = (part[own] + changes).to(part.dtype)
        yield slice(start, start + step), part


def _sampled(crows: Tensor, columns: Tensor, sums: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """`sums`, and u vᵀ at the entries of a matrix with compressed rows."""
    entries = compressed(crows, columns, sums, (len(u), len(v)))
    return torch.sparse.sampled_addmm(entries, u, v.t()).values()


def compressed(crows: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """A matrix with compressed rows."""
    _warn_unheard()
    on = values.device  # not the default one
    return torch.sparse_csr_tensor(crows, columns, values, size, device=on, check_invariants=False)


@functools.cache
def _warn_unheard() -> None:
    """Lets torch say that its compressed matrices are new, which it does once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, ends = torch.ones(1, 1, device="cpu"), torch.tensor([0, 1], device="cpu")
        entries = torch.sparse_csr_tensor(ends, ends[:1], one[0], (1, 1), device="cpu")
        torch.sparse.sampled_addmm(entries, one, one)
