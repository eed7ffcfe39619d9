"""Products: LyCORIS's factors as ours, where it has one more of a kernel, or a norm beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from peftlite.core.tensors import wide
from peftlite.methods.loha import LoHa
from peftlite.methods.lokr import LoKr

Get: TypeAlias = Callable[[str], Tensor]
Recipe: TypeAlias = Callable[[Get], Tensor]
"""What makes a tensor of ours of the file's, which it asks for by their keys."""


def tucker(made: Mapping[str, Recipe], low: str, core: str) -> dict[str, Recipe]:
    """A kernel's factors without their core (r, r, *taps), which goes into `low`, that of inputs.

    Beside a core the factor of the outputs lies the other way, (r, o), in all but LoRA.
    """

    high = low.replace("b", "a")
    theirs, other = made[low], made[high]

    def inputs(get: Get) -> Tensor:
        t, x = get(core), theirs(get)
        dtype = wide(t, x)
        return torch.einsum("pq...,qi->pi...", t.to(dtype), x.to(dtype)).flatten(1)

    return {low: inputs} | ({} if low == high else {high: lambda get: other(get).mT})


def unrolled(made: Mapping[str, Recipe], k: int) -> dict[str, Recipe]:
    """loralib's factors of a kernel k × k, A (rk, ik) and B (ok, rk), as ours of rank rk².

    It takes BA for the kernel as it lies in memory: k rows of BA make one output.
    """
    a, b = made["a"], made["b"]

    def inputs(get: Get) -> Tensor:
        return _kron(_identity(k, x := a(get)), x)

    return {"a": inputs, "b": lambda get: (x := b(get)).reshape(-1, k * x.shape[1])}


def decomposed(made: Mapping[str, Recipe], kind: type[LoHa] | type[LoKr]) -> dict[str, Recipe]:
    """The factors of LoHa or LoKr as A and B of one product, as DoRA has them."""

    def factors(get: Get) -> tuple[Tensor, Tensor]:
        t = {p: recipe(get) for p, recipe in made.items() if p != "m"}
        return (_hadamard if kind is LoHa else _kronecker)({p: x.to(wide(x)) for p, x in t.items()})

    return {"a": lambda get: factors(get)[0], "b": lambda get: factors(get)[1], "m": made["m"]}


def _hadamard(t: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A (r², i) and B (o, r²)."""
    a = torch.einsum("pi,qi->pqi", t["w1b"], t["w2b"]).flatten(0, 1)
    return a, torch.einsum("op,oq->opq", t["w1a"], t["w2a"]).flatten(1)


def _kronecker(t: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A (i₁·r, i) and B (o, i₁·r), with o₂ for r where w2 is whole."""
    w1 = t["w1"] if "w1" in t else t["w1a"] @ t["w1b"]
    b, a = (_identity(len(t["w2"]), w1), t["w2"]) if "w2" in t else (t["w2a"], t["w2b"])
    return _kron(_identity(w1.shape[1], w1), a), _kron(w1, b)


def _kron(x: Tensor, y: Tensor) -> Tensor:
    """torch.kron of two matrices, which on the meta device fails at some strides (2.13)."""
    return (x[:, None, :, None] * y[None, :, None, :]).flatten(2).flatten(0, 1)


def _identity(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)
