"""Fisher information: how much the loss minds a change of each entry of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.site import sites
from peftlite.core.tensors import wide
from peftlite.errors import PeftliteError


def fish_scores(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """F = E[(∂ loss/∂W)²] over examples, for every trainable parameter: the scores of `SparseMask`.

    Sung et al., arXiv:2111.09839, §3, with the data's labels. They take 1,024 examples.

    Args:
        loss: gives the losses of a batch's examples, one each: `reduction="none"`. A single number
            counts as one example's.
        batches: what `loss(model, batch)` is given in turn.

    Returns:
        Scores by address, in the shape of the parameter, in fp32 or wider.

    Raises:
        PeftliteError: there are no batches, or no parameter that requires gradients.

    Example:
        model, x = nn.Linear(4, 2), torch.randn(8, 4)
        scores = pl.fish_scores(model, lambda model, x: model(x).square().sum(-1), [x])
        pl.attach(model, pl.SparseMask(fraction=0.5, select="fish", scores=scores))
    """
    found = {site.address: site.whole for site in sites(model) if not site.is_call}
    found = {address: w for address, w in found.items() if w.requires_grad and w.is_leaf}
    scores = {address: torch.zeros_like(w, dtype=wide(w)) for address, w in found.items()}
    examples = 0
    for batch in batches if found else ():
        losses = loss(model, batch).reshape(-1)
        examples += len(losses)
        for i, one in enumerate(losses, start=1):
            grads = torch.autograd.grad(
                one, [*found.values()], retain_graph=i < len(losses), allow_unused=True
            )
            for score, grad in zip(scores.values(), grads, strict=True):
                if grad is not None:
                    score += grad.to_dense().to(score.dtype).square()
    if not examples:
        raise PeftliteError(
            "fish_scores saw no gradient: give it batches, and a model whose parameters require "
            "gradients (pl.attach freezes them: score them before)"
        )
    return {address: score / examples for address, score in scores.items()}
