"""The errors of kernels."""

from dataclasses import replace
from typing import Any
from unittest import mock

import torch

import peftlite as pl
from peftlite.kernels import dispatch
from peftlite.kernels.native import low_rank
from tests.coded import Coded
from tests.errors.case import Case

OFF = replace(low_rank.SINGLE, lib=None, why="PEFTLITE_NATIVE is 0", _settled=True)


def twice(*_: Any) -> Any:
    h = torch.ones(1, 3, requires_grad=True)
    head = torch.nn.Linear(3, 4).requires_grad_(False)
    logp, _ = pl.kernels.log_probs(h, head, torch.zeros(1).long())
    torch.autograd.grad(logp.sum(), h, create_graph=True)


class Dynamic(Coded):
    """With activations in codes, which have no gradient."""

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__torch_function__(*args, **kwargs).detach()


def without_gradients(*_: Any) -> Any:
    w = Dynamic(torch.ones(4, 3, dtype=torch.int8), torch.ones(4, 1))
    x = torch.ones(2, 3, requires_grad=True)
    pl.kernels.lora_linear(x, w, None, torch.ones(1, 3), torch.ones(4, 1)).sum().backward()


CASES = [
    Case(without_gradients,
         "the product of Dynamic passes no gradient on, as where activations are quantised too: "
         "what comes before it can't learn. Take it to serve, and train on a base whose weights "
         "alone are quantised"),
    Case(twice, "log_probs is differentiated once: for second derivatives take the logits"),
    Case(lambda *_: pl.kernels.backend("cuda"),  # type: ignore
         "no backend 'cuda': there are reference, torch, native, triton, and None"),
    Case(mock.patch.multiple(low_rank, SINGLE=OFF, KERNELS={torch.bfloat16: (OFF,)})(
             lambda *_: pl.kernels.backend("native")),
         "backend 'native' can't run here: PEFTLITE_NATIVE is 0"),
    Case(mock.patch.object(dispatch, "_HAS_TRITON", False)(
             lambda *_: pl.kernels.backend("triton")),
         "backend 'triton' needs the package triton: pip install triton"),
]  # fmt: skip
