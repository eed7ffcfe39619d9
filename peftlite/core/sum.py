"""Sum: W' = W + s·UV as a tensor, which is multiplied with by its parts and never formed.

Modules that read a weight by themselves mostly do nothing with it but take an expert's matrix out,
turn it over, and multiply. All of that is known of W, U and V alone; whatever else is asked of it
has W' formed. U and V are in the tensor's own order: W (…, m, n), U (…, m, r) and V (…, r, n).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlite.core.patch import Patch
from peftlite.core.tensors import wide
from peftlite.core.tokens import Lost, Tokens, told
from peftlite.kernels import dispatch
from peftlite.kernels.experts import Product, experts_linear
from peftlite.kernels.linear import lora_linear
from peftlite.kernels.tokens import by_tokens
from peftlite.lazy import Lazy


class Patched(Lazy):
    """A tensor of the base as patches change it."""

    kind = "patched"

    def why_not_written(self) -> str:
        return (
            "patches change: what is read here is a value of its own, and the writing would be "
            "lost. pl.detach first"
        )


class Sum(Patched):
    """W + s·UV; with `ids` (k,), of the matrices U and V of those experts, and W (k, m, n)."""

    raw: Tensor
    left: Tensor
    right: Tensor
    scale: Any
    ids: Tensor | None

    @staticmethod
    def __new__(cls: type[Sum], raw: Tensor, *_: Any) -> Sum:
        return Tensor._make_wrapper_subclass(cls, raw.shape, dtype=raw.dtype, device=raw.device)

    def __init__(
        self, raw: Tensor, left: Tensor, right: Tensor, scale: Any, ids: Tensor | None = None
    ):
        self.raw, self.left, self.right, self.scale, self.ids = raw, left, right, scale, ids

    def form(self) -> Tensor:
        dtype = wide(self.raw, self.left)
        left, right = self.left.to(dtype), self.right.to(dtype)
        product = left @ right if self.ids is None else left[self.ids] @ right[self.ids]
        return torch.add(self.raw, product, alpha=self.scale).to(self.raw.dtype)

    def parts(self, view: Callable[[Tensor], Tensor]) -> Sum:
        """The same view of all three."""
        return type(self)(view(self.raw), view(self.left), view(self.right), self.scale)

    @cached_property
    def each(self) -> list[Sum]:
        """Every matrix; they are taken apart once, so that gradients are put together once."""
        return self.apart(Tensor.unbind)

    def apart(self, take: Callable[[Tensor], Sequence[Tensor]]) -> list[Sum]:
        """The sums of what all three are taken apart into."""
        parts = zip(take(self.raw), take(self.left), take(self.right), strict=True)
        return [type(self)(raw, left, right, self.scale) for raw, left, right in parts]

    @cached_property
    def turned(self) -> Sum:
        return type(self)(self.raw.mT, self.right.mT, self.left.mT, self.scale, self.ids)

    @property
    def stacked(self) -> bool:
        """Whether its first dimension is one of experts."""
        return self.raw.dim() > 2 and self.ids is None

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W'ᵀ + bias, for a W (m, n)."""
        return lora_linear(x, self.raw, bias, self.right, self.left, self.scale)

    def experts(self, product: Product, x: Tensor) -> Tensor:
        """x W' by experts, for a W (e, m, n)."""
        return experts_linear(product, x, self.raw, self.left, self.right, self.scale)

    @classmethod
    def compute(
        cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        found = answer(func, args, kwargs)
        return super().compute(func, args, kwargs) if found is NotImplemented else found


class SumByToken(Sum):
    """W + s_k·UV, with the k of each token: U (…, k, m, r), V (…, k, r, n) and s (k,)."""

    def form(self) -> Tensor:
        raise Lost

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = told(x)
        y = F.linear(x.plain, self.raw, bias)
        factors = self.right.mT[None], self.left.mT[None]
        return Tokens.of(by_tokens(y, x.plain, x.own, None, *factors, self.scale), x.own)

    def experts(self, product: Product, x: Tensor) -> Tensor:
        x, experts = told(x), product.ids
        y = product.times(x.plain, self.raw)
        if experts is None:
            experts = torch.zeros_like(x.own)
            for expert, tokens in product.groups():
                experts[tokens] = expert
        factors = self.left, self.right
        return Tokens.of(by_tokens(y, x.plain, x.own, experts, *factors, self.scale), x.own)


def summed(raw: Tensor, patches: Sequence[Patch]) -> Sum | None:
    """W' as a sum, where all that patches it is a product of low rank; or None."""
    found = [patch.product() if patch.index is None else None for patch in patches]
    products = [product for product in found if product is not None]
    if len(products) < len(found) or not dispatch.is_plain_weight(raw):
        return None
    if len(products) == 1:
        left, right, scale = products[0]
        kind = SumByToken if left.dim() > raw.dim() else Sum
        return kind(raw, left, right, scale)
    left = torch.cat([scale * left for left, _, scale in products], -1)
    return Sum(raw, left, torch.cat([right for _, right, _ in products], -2), 1.0)


def answer(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation on sums gives, by their parts; NotImplemented where it takes W'."""
    try:
        return KNOWN[func](*args, **kwargs) if func in KNOWN else NotImplemented
    except TypeError:  # arguments of another kind than those that are known
        return NotImplemented


# -- looking at a part of it, or from another side


def expert_of(index: Any) -> int | None:
    """The one expert that an index names; None if it names none, or not one."""
    if isinstance(index, int) and not isinstance(index, bool):
        return index
    if type(index) is Tensor and index.dim() == 0 and _counts(index):
        return int(index)
    return None


def _counts(index: Tensor) -> bool:
    return index.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)


def _at(w: Sum, index: Any) -> Any:
    if not w.stacked:
        return NotImplemented
    expert = expert_of(index)
    if expert is not None:
        return w.each[expert]
    if isinstance(index, slice):
        return w.parts(lambda t: t[index])
    if type(index) is not Tensor or index.dim() != 1 or not _counts(index) or w.raw.dim() != 3:
        return NotImplemented
    if len(index) == 1:
        return w.each[int(index)].parts(lambda t: t[None])
    return type(w)(w.raw[index], w.left, w.right, w.scale, index)


def _transpose(w: Sum, one: int, other: int) -> Any:
    dims = w.raw.dim()
    return w.turned if {one % dims, other % dims} == {dims - 2, dims - 1} else NotImplemented


def _permute(w: Sum, *order: Any) -> Any:
    dims = order[0] if len(order) == 1 else order
    last = w.raw.dim() - 2
    turns = [dim % w.raw.dim() for dim in dims] == [*range(last), last + 1, last]
    return w.turned if turns else NotImplemented


def _unbind(w: Sum, dim: int = 0) -> Any:
    return tuple(w.each) if w.stacked and dim == 0 else NotImplemented


def _chunk(w: Sum, chunks: int, dim: int = 0) -> Any:
    return tuple(w.apart(lambda t: t.chunk(chunks))) if w.stacked and dim == 0 else NotImplemented


def _squeeze(w: Sum, dim: int) -> Any:
    return w.each[0] if w.stacked and dim == 0 and len(w.raw) == 1 else NotImplemented


def _view(w: Sum, *shape: Any) -> Any:
    """As a stack of matrices, of one whose rows are those of all."""
    raw = w.raw.view(*shape)
    if type(w) is not Sum or w.raw.dim() != 2 or raw.dim() != 3 or raw.shape[-1] != w.raw.shape[-1]:
        return NotImplemented
    left = w.left.view(*raw.shape[:-1], -1)
    return Sum(raw, left, w.right.expand(len(raw), -1, -1), w.scale)


# -- multiplying


def _times(x: Tensor, w: Sum, bias: Tensor | None = None) -> Any:
    """x W' + bias, as torch.matmul multiplies."""
    if w.raw.dim() == 2:
        return w.turned.linear(x, bias)
    if w.raw.dim() != 3 or bias is not None or x.dim() not in (2, 3):
        return NotImplemented
    if x.dim() == 2 or len(x) != len(w.raw):
        x = x.expand(len(w.raw), *x.shape[-2:])
    return w.experts(_batched(w), x)


def _batched(w: Sum) -> Product:
    ids = w.ids
    if ids is None:
        return Product(torch.bmm, lambda: [(e, e) for e in range(len(w.raw))])

    def groups() -> Sequence[tuple[int, Tensor]]:
        return [(e, (ids == e).nonzero()[:, 0]) for e in ids.unique().tolist()]

    return Product(torch.bmm, groups, ids)


def _matmul(a: Tensor, b: Tensor) -> Any:
    if not isinstance(a, Sum):
        return _times(a, b)
    if isinstance(b, Sum) or b.dim() < 2:
        return NotImplemented
    y = _times(b.mT, a.turned)
    return y if y is NotImplemented else y.mT


def _linear(x: Tensor, w: Sum, bias: Tensor | None = None) -> Any:
    if not isinstance(w, Sum) or w.raw.dim() != 2 or isinstance(x, Sum):
        return NotImplemented
    return w.linear(x, bias)


def _grouped(x: Tensor, w: Sum, offs: Tensor, **other: Any) -> Any:
    """x (t, m) times W' (e, m, n), for tokens that are sorted by experts, which end at `offs`."""
    if isinstance(x, Sum) or w.raw.dim() != 3 or any(v is not None for v in other.values()):
        return NotImplemented

    def groups() -> Sequence[tuple[int, slice]]:
        ends = offs.tolist()
        spans = enumerate(zip([0, *ends], ends, strict=False))
        return [(e, slice(start, end)) for e, (start, end) in spans if end > start]

    times = partial(F.grouped_mm, offs=offs)
    return w.experts(Product(times, groups), x)


def _einsum(equation: str, *operands: Any) -> Any:
    """The sums over inputs first, then what is small, then those over ranks: left to right."""
    terms, arrow, out = equation.replace(" ", "").partition("->")
    sums = [k for k, operand in enumerate(operands) if isinstance(operand, Sum)]
    if not arrow or "." in terms or len(sums) != 1 or operands[sums[0]].ids is not None:
        return NotImplemented
    if type(operands[sums[0]]) is not Sum:
        return NotImplemented
    terms, (k,) = terms.split(","), sums
    w, rest = operands[k], [*range(len(terms))]
    rest.remove(k)
    (*stack, m, n), rank = terms[k], next(c for c in "rRsSuUvV" if c not in equation)
    first, last = ([*stack, rank, n], w.right), ([*stack, m, rank], w.left)
    if n in out:
        first, last, m, n = last, first, n, m
    rest.sort(key=lambda j: n not in terms[j])
    names = ["".join(first[0]), *(terms[j] for j in rest), "".join(last[0])]
    dtype = wide(w.raw, w.left)
    parts = [first[1], *(operands[j] for j in rest), last[1]]
    change = torch.einsum(",".join(names) + "->" + out, *(part.to(dtype) for part in parts))
    y = torch.einsum(equation, *operands[:k], w.raw, *operands[k + 1 :])
    return torch.add(y, change, alpha=w.scale).to(y.dtype)


_T: Any = Tensor
KNOWN: dict[Any, Callable[..., Any]] = {
    _T.__getitem__: _at,
    _T.mT.__get__: lambda w: w.turned,
    _T.contiguous: lambda w: w,
    **dict.fromkeys((_T.transpose, torch.transpose, _T.swapaxes, _T.swapdims), _transpose),
    **dict.fromkeys((_T.t, torch.t, _T.T.__get__), lambda w: _transpose(w, 0, 1)),
    **dict.fromkeys((_T.permute, torch.permute), _permute),
    **dict.fromkeys((_T.unbind, torch.unbind), _unbind),
    **dict.fromkeys((_T.chunk, torch.chunk), _chunk),
    **dict.fromkeys((_T.squeeze, torch.squeeze), _squeeze),
    **dict.fromkeys((_T.view, _T.reshape), _view),
    **dict.fromkeys((_T.matmul, torch.matmul, _T.__matmul__, _T.mm, torch.mm), _matmul),
    **dict.fromkeys((_T.bmm, torch.bmm), _matmul),
    _T.__rmatmul__: lambda b, a: _matmul(a, b),
    F.linear: _linear,
    torch._C._VariableFunctions._grouped_mm: _grouped,  # what F.grouped_mm is
    torch.einsum: _einsum,
}
