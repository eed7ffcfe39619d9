"""The errors of kernels."""

from unittest import mock

import peftlite as pl
from peftlite.kernels import dispatch
from tests.errors.case import Case

CASES = [
    Case(lambda *_: pl.kernels.backend("cuda"),  # type: ignore
         "no backend 'cuda': there are reference, torch, triton, and None"),
    Case(mock.patch.object(dispatch, "_HAS_TRITON", False)(
             lambda *_: pl.kernels.backend("triton")),
         "backend 'triton' needs the package triton: pip install triton"),
]  # fmt: skip
