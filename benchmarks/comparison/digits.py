"""T3: a small vision transformer that knows the digits 0 to 4 learns 5 to 9 from 200 images.

The 896 images of 5 to 9 are shuffled once: 200 train, 200 validate, the other 496 test. The base
learned from four fifths of the images of 0 to 4; the rest say what it forgets. Every loss and every
accuracy is among the five digits at hand: which five a digit is from can't be learned from one of
them. Data: scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.patch import Target

from .task import Judgement, Split, Task

OLD, NEW = slice(0, 5), slice(5, 10)
STEPS = 100
DIM, LAYERS, HEADS, BATCH = 64, 2, 4, 40


class Images(NamedTuple):
    """Images (b, 8, 8) in [0, 1], and the digits on them (b)."""

    pixels: Tensor
    digits: Tensor

    def pick(self, index: Tensor) -> Images:
        return Images(self.pixels[index], self.digits[index])

    def split(self, *sizes: int) -> list[Images]:
        """The first so many, the next, and so on, and what is left."""
        left = len(self.digits) - sum(sizes)
        return [*map(Images, *(part.split([*sizes, left]) for part in self))]


class ViT(nn.Module):
    """Images (b, 8, 8) to logits (b, 10), by way of 16 patches of 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, DIM)
        self.position = nn.Parameter(0.02 * torch.randn(16, DIM))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = F.unfold(pixels[:, None], 2, stride=2).mT  # (b, 16, 4)
        h = self.embed(patches) + self.position
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h).mean(1))


class Block(nn.Module):
    """h + attention(norm h), then h + mlp(norm h); h (b, t, DIM)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(DIM), Attention()
        self.mlp_norm, self.mlp = nn.LayerNorm(DIM), MLP()

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attention(self.attention_norm(h))
        return h + self.mlp(self.mlp_norm(h))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.q_proj, self.k_proj = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.v_proj, self.o_proj = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        projected = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in projected)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Digits(Task):
    name = "T3 digits"
    quality = "accuracy on 5 to 9"
    version = 1
    batch = BATCH
    rate = 2e-3
    head = "head"
    new_head = True
    narrow = "embed"
    places: ClassVar[Mapping[str, Target]] = {
        "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "keys": "k_proj",
        "values": "v_proj",
        "down": "mlp.down",
    }

    def __init__(self, cache: Path, quick: bool = False) -> None:
        self.steps = 2 if quick else STEPS
        old, new = _shuffled(OLD), _shuffled(NEW)
        known, self.kept = old.split(len(old.digits) * 4 // 5)
        self.train, *held = new.split(200, 200)
        self.held = dict(zip(("validation", "test"), held, strict=True))
        self.base = _pretrained(known, 20 if quick else 600)

    def sample(self, draw: torch.Generator) -> Images:
        return _sample(self.train, draw)

    def losses(self, model: nn.Module, batch: Images) -> Tensor:
        return _losses(model, batch, NEW)

    @torch.no_grad()
    def judge(self, model: nn.Module, split: Split) -> Judgement:
        images = self.held[split]
        logits = model(images.pixels)[:, NEW]
        right = logits.argmax(-1) == images.digits - NEW.start
        return Judgement(_losses(model, images, NEW).mean().item(), right.float().mean().item())

    @torch.no_grad()
    def own_loss(self, model: nn.Module) -> float:
        return _losses(model, self.kept, OLD).mean().item()


def _losses(model: nn.Module, images: Images, among: slice) -> Tensor:
    logits = model(images.pixels)[:, among]
    return F.cross_entropy(logits, images.digits - among.start, reduction="none")


def _sample(images: Images, draw: torch.Generator) -> Images:
    return images.pick(torch.randint(len(images.digits), (BATCH,), generator=draw))


def _shuffled(among: slice) -> Images:
    """The images of some digits, in the same order every time."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels, digits = torch.from_numpy(data.images).float() / 16, torch.from_numpy(data.target)
    found = ((among.start <= digits) & (digits < among.stop)).nonzero()[:, 0]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return Images(pixels, digits).pick(found[order])


def _pretrained(images: Images, steps: int) -> ViT:
    """Takes seconds, so it isn't cached."""
    torch.manual_seed(0)
    draw, model = torch.Generator().manual_seed(0), ViT()
    adamw = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adamw, 2e-3, steps)
    for _ in range(steps):
        adamw.zero_grad()
        _losses(model, _sample(images, draw), OLD).mean().backward()
        adamw.step()
        schedule.step()
    return model
