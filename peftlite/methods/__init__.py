"""The methods, one file each; and what the author of another one needs."""

from peftlite.core.layout import Layout
from peftlite.core.patch import Method, Patch, WeightMethod, trainable
from peftlite.core.tensors import wide
from peftlite.fields import integer, number, one_of, positive
from peftlite.methods import catalog
from peftlite.methods.calls import CallMethod, CallPatch
from peftlite.methods.catalog import *  # noqa: F403
from peftlite.methods.low_rank import LowRankPatch, RankMethod

__all__ = [
    "CallMethod", "CallPatch", "Layout", "LowRankPatch", "Method", "Patch", "RankMethod",
    "WeightMethod", "integer", "number", "one_of", "positive", "trainable", "wide",
]  # fmt: skip
__all__ += catalog.__all__
