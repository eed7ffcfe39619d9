"""log p(label | h) and the entropy of p = softmax(head(h)), a tile of tokens at a time.

    z = head(h)/T     log p = z_label − logsumexp z     H = logsumexp z − Σ p z

The logits (t, o) of all tokens are never there at once. Where no gradient goes to the head itself,
d log p/dh = (onehot − p) ∂z/∂h is formed in the forward pass, while a tile's p is at hand: the
product that a backward pass would make, only sooner, and i numbers a token are kept of it. Else a
tile is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftlite.errors import PeftliteError
from peftlite.kernels import reference

Head = Callable[[Tensor], Tensor]


def log_probs(
    h: Tensor,
    head: Head,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(label) and the entropy of p = softmax(head(h)/T), without all the logits at once.

    Any head serves: a linear layer that is tied, packed or has a delta on it, or a function. Both
    results are in fp32, or in the wider dtype of h; where a label is −100 they are 0, and nothing
    is computed.

    Args:
        h: (…, i), what the head takes.
        head: from (n, i) to logits (n, o).
        labels: (…), an id below o for each.
        temperature: T, above 0.
        entropy_gradient: whether the entropy is to be differentiated, too. The logits are then
            computed twice, as they are where the head itself is trained.
        tile: tokens at a time; by default a sixteenth of them, within 128 and 1,024.

    Raises:
        PeftliteError: the labels aren't as many as the vectors.

    Example:
        h, head = torch.randn(2, 3, 4, requires_grad=True), nn.Linear(4, 9).requires_grad_(False)
        logp, entropy = pl.kernels.log_probs(h, head, torch.randint(9, (2, 3)))
        logp.sum().backward()
    """
    if h.shape[:-1] != labels.shape:
        raise PeftliteError(
            f"h of shape {tuple(h.shape)} is for labels of shape {tuple(h.shape[:-1])}, not "
            f"{tuple(labels.shape)}"
        )
    learned = labels != reference.IGNORED
    x, wanted = h[learned], labels[learned]
    size = tile or min(max(len(x) // 16, 128), 1024)
    with torch.enable_grad():
        trained = head(x[:0].detach()).requires_grad
    if torch.is_grad_enabled() and (trained or (entropy_gradient and x.requires_grad)):
        options: Any = {"use_reentrant": False, "preserve_rng_state": True}
        parts = [
            checkpoint(reference.log_probs, own, head, ids, temperature, **options)
            for own, ids in zip(x.split(size), wanted.split(size), strict=True)
        ]
        found = [torch.cat(each) for each in zip(*parts, strict=True)]
    elif torch.is_grad_enabled() and x.requires_grad:
        found = _Frozen.apply(x, head, wanted, temperature, size)
    else:
        found = _by_tiles(x, head, wanted, temperature, size, None)
    logp, entropy = (each.new_zeros(labels.shape).masked_scatter(learned, each) for each in found)
    return logp, entropy


def _by_tiles(
    x: Tensor, head: Head, labels: Tensor, temperature: float, size: int, slope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log p and the entropy (n), for x (n, i); d log p/dx is written into `slope` (n, i)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logp, entropy = (x.new_empty(len(x), dtype=wide) for _ in range(2))
    for start in range(0, len(x), size):
        own = slice(start, start + size)
        into = None if slope is None else slope[own]
        logp[own], entropy[own] = _tile(x[own], head, labels[own, None], temperature, wide, into)
    return logp, entropy


def _tile(
    x: Tensor, head: Head, labels: Tensor, temperature: float, wide: torch.dtype, slope: Any
) -> tuple[Tensor, Tensor]:
    """The same of one tile, labels (n, 1); when it returns, its logits are gone."""
    needed = slope is not None
    with torch.set_grad_enabled(needed):
        part = x.detach().requires_grad_(needed)
        logits = head(part)
    z = logits.detach().to(wide)
    z = z / temperature if temperature != 1 else z
    p = z.softmax(-1)
    # logsumexp z by the likeliest label, whose p is exact: in half the time
    total = z.amax(-1) - p.amax(-1).log()
    logp = z.gather(-1, labels)[:, 0] - total
    entropy = total - torch.linalg.vecdot(p, z)
    if needed:
        p.scatter_add_(-1, labels, p.new_full((len(p), 1), -1.0))
        p = p.div_(-temperature).to(logits.dtype)
        slope.copy_(torch.autograd.grad(logits, part, p)[0])
    return logp, entropy


class _Frozen(torch.autograd.Function):
    """Of a head that gets no gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, head: Head, labels: Tensor, temperature: float, size: int
    ) -> tuple[Tensor, Tensor]:
        slope = torch.empty_like(x)
        logp, entropy = _by_tiles(x, head, labels, temperature, size, slope)
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise PeftliteError(
                "log_probs is differentiated once: for second derivatives take the logits"
            )
        return (slope * grad_outputs[0][:, None]).to(slope.dtype), None, None, None, None
