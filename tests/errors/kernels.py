"""The errors of kernels."""

from dataclasses import replace
from unittest import mock

import peftlite as pl
from peftlite.kernels import dispatch
from peftlite.kernels.native import low_rank
from tests.errors.case import Case

OFF = replace(low_rank.KERNEL, lib=None, why="PEFTLITE_NATIVE is 0", _settled=True)

CASES = [
    Case(lambda *_: pl.kernels.backend("cuda"),  # type: ignore
         "no backend 'cuda': there are reference, torch, native, triton, and None"),
    Case(mock.patch.multiple(low_rank, KERNEL=OFF)(lambda *_: pl.kernels.backend("native")),
         "backend 'native' can't run here: PEFTLITE_NATIVE is 0"),
    Case(mock.patch.object(dispatch, "_HAS_TRITON", False)(
             lambda *_: pl.kernels.backend("triton")),
         "backend 'triton' needs the package triton: pip install triton"),
]  # fmt: skip
