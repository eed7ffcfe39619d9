"""Balance: weights of classes that are seen more or less often."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from peftlite.errors import PeftliteError
from peftlite.fields import check_given
from peftlite.table import short
from peftlite.train.data.packing import IGNORED

How = Literal["inverse", "effective"]


def class_weights(
    labels: Sequence[int] | Tensor,
    classes: int | None = None,
    *,
    how: How = "inverse",
    beta: float = 0.999,
) -> Tensor:
    """w_k = n / (o n_k), or ∝ (1 − β) / (1 − β^n_k): each class's weight in the loss, (o) in fp32.

    n is the number of labels, n_k that of class k, o that of classes.

    Args:
        labels: of all examples, from 0, in any shape; −100, which losses leave out, has no weight.
        classes: o; by default the largest label and one.
        how: "inverse", by frequency: over the examples the weights average 1. "effective", by the
            effective number of samples (Cui et al. 2019, arXiv:1901.05555, eq. 2): over the classes
            they average 1.
        beta: β in [0, 1): 0 weighs all alike, near 1 it is as "inverse".

    Raises:
        PeftliteError: labels are no whole numbers from 0, or a class has no examples, which no
            weight makes up for.

    Example:
        weight = pl.data.class_weights([0, 0, 0, 1], how="effective", beta=0.9)
        x, labels = torch.randn(4, 3), torch.tensor([0, 0, 0, 1])
        loss = pl.losses.classification(nn.Linear(3, 2), (x, labels), weight=weight)
    """
    check_given("how", how, get_args(How))
    if not 0 <= beta < 1:
        raise PeftliteError(f"beta must be in [0, 1), not {beta!r}")
    given = torch.as_tensor(labels).flatten()
    given = given[given != IGNORED]
    if given.is_floating_point() or (given < 0).any():
        raise PeftliteError(
            f"labels are whole numbers from 0 up, or {IGNORED}: not {short(labels)}"
        )
    counts = torch.bincount(given, minlength=classes or 0)
    if classes is not None and len(counts) > classes:
        raise PeftliteError(f"there are labels up to {len(counts) - 1}, and {classes} classes")
    if missing := (counts == 0).nonzero().flatten().tolist():
        raise PeftliteError(f"no example has the labels {missing}, so they can't be weighed")
    n = counts.double()
    if how == "inverse":
        return (n.sum() / (len(n) * n)).float()
    rate = math.log(beta) if beta else -math.inf
    weights = 1 / -torch.expm1(rate * n)
    return (weights * len(n) / weights.sum()).float()
