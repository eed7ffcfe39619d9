"""Every operation in plain torch: the truth that the fast paths are tested against in fp64.

Shape letters: t tokens, i in, o out, r rank. Whatever takes `dropout` takes the `seed` of
its mask with it, an int64 tensor of no dimensions, of which the mask is a function. Without a seed
the mask is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

WORD, HALF = 0xFFFFFFFF, 0xFFFF
# odd constants of 32 bits: one to step by, and the two of the mixing (Appleby's MurmurHash3)
STEP, FIRST, SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35


def lora_linear(
    x: Tensor,
    w: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + s·drop(x) Aᵀ Bᵀ, for x (..., i), W (o, i), A (r, i) and B (o, r).

    The low-rank part is formed in the wider dtype of x and A. Without W, it is all there is.
    """
    wide = torch.promote_types(x.dtype, a.dtype)
    h = shrink(x.to(wide), a.to(wide), dropout, seed)
    b = b.to(wide)
    if w is None:
        return (scale * F.linear(h, b)).to(x.dtype)
    y = F.linear(x, w, bias)
    if y.dim() == 2 and y.dtype is h.dtype:
        return torch.addmm(y, h, b.t(), alpha=scale)
    return torch.add(y, F.linear(h, b), alpha=scale).to(y.dtype)


def shrink(x: Tensor, a: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """h = drop(x) Aᵀ, (..., r)."""
    return F.linear(drop(x, dropout, seed) if dropout else x, a)


def grad_ab(dy: Tensor, h: Tensor, b: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """What the output's gradient (t, o) gives h and B: dh = s·dY B and dB = s·dYᵀ h."""
    return scale * (dy @ b), scale * (dy.t() @ h)


def grad_a(dh: Tensor, x: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """dA = dhᵀ drop(x), for dh (t, r) and x (t, i), with the mask made again."""
    return dh.t() @ (drop(x, dropout, seed) if dropout else x)


def expand(
    h: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """h U + bias for U (r, o), or drop(h U): what a low rank adds to y, or to the gradient of x."""
    y = h @ up if bias is None else h @ up + bias
    return drop(y, dropout, seed) if dropout else y


IGNORED = -100  # the label of a token that isn't learned


def log_probs(
    h: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log p(label) and the entropy (n) of p = softmax(head(h)/T), for h (n, i) and labels (n)."""
    z = head(h)
    log_p = F.log_softmax(z.to(torch.promote_types(z.dtype, torch.float32)) / temperature, -1)
    return log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def rows_low_rank(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, slots: Tensor
) -> None:
    """y += s·(x Aᵀ) Bᵀ, each row of the batch with the factors of its slot. Slot 0 adds nothing.

    Shapes, for S slots of at most R ranks: y (b, ..., o), x (b, ..., i), A (S, R, i), B (S, o, R),
    scale and ranks (S,), slots (b,). What A and B hold beyond a slot's rank isn't read.
    """
    for slot in slots.unique().tolist():
        if slot > 0:
            own, rank = slots == slot, int(ranks[slot])
            h = x[own] @ a[slot, :rank].t()
            y[own] += scale[slot] * (h @ b[slot, :, :rank].t())


def drop(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """x (..., i) with zeros where the mask has them, the rest divided by what is kept."""
    if seed is None:
        return F.dropout(x, dropout)
    tokens = x[..., 0].numel()
    mask = keep(seed, tokens, x.shape[-1], dropout).view(x.shape)
    return torch.where(mask, x, 0) * kept(dropout)


def threshold(dropout: float) -> int:
    """The probability in steps of 2⁻¹⁶, as half a word is compared with it."""
    return min(round(dropout * 2**16), HALF)


def kept(dropout: float) -> float:
    """The factor of what dropout keeps."""
    return 2**16 / (2**16 - threshold(dropout))


def scaled(scale: float, dropout: float) -> float:
    """The scale of what dropout keeps, where a mask alone is applied."""
    return scale * kept(dropout) if dropout else scale


def keep(seed: Tensor, tokens: int, i: int, dropout: float) -> Tensor:
    """(t, i) of bool, False with probability `dropout`.

    A word is hashed of the seed, the row and the pair of columns; its halves decide for the two.
    """
    row = torch.arange(tokens, device=seed.device)[:, None]
    pair = torch.arange((i + 1) // 2, device=seed.device)
    word = _mix(_mix(row * STEP ^ seed) ^ _mix(pair * STEP ^ seed >> 32))
    halves = torch.stack([word & HALF, word >> 16], -1).flatten(-2)[:, :i]
    return halves ^ 0x8000 >= threshold(dropout)


def _mix(word: Tensor) -> Tensor:
    """A hash of the low 32 bits of every entry."""
    word = word * FIRST & WORD
    word = (word ^ word >> 13) * SECOND & WORD
    return word ^ word >> 16
