"""The errors of kernels."""

from dataclasses import replace
from typing import Any
from unittest import mock

import torch

import peftlite as pl
from peftlite.kernels import dispatch
from peftlite.kernels.native import low_rank
from tests.errors.case import Case

OFF = replace(low_rank.KERNEL, lib=None, why="PEFTLITE_NATIVE is 0", _settled=True)


def twice(*_: Any) -> Any:
    h = torch.ones(1, 3, requires_grad=True)
    head = torch.nn.Linear(3, 4).requires_grad_(False)
    logp, _ = pl.kernels.log_probs(h, head, torch.zeros(1).long())
    torch.autograd.grad(logp.sum(), h, create_graph=True)


CASES = [
    Case(twice, "log_probs is differentiated once: for second derivatives take the logits"),
    Case(lambda *_: pl.kernels.backend("cuda"),  # type: ignore
         "no backend 'cuda': there are reference, torch, native, triton, and None"),
    Case(mock.patch.multiple(low_rank, KERNEL=OFF)(lambda *_: pl.kernels.backend("native")),
         "backend 'native' can't run here: PEFTLITE_NATIVE is 0"),
    Case(mock.patch.object(dispatch, "_HAS_TRITON", False)(
             lambda *_: pl.kernels.backend("triton")),
         "backend 'triton' needs the package triton: pip install triton"),
]  # fmt: skip
