"""A small byte-level GPT: pre-norm blocks, rotary attention, squared-ReLU MLP, no biases."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

BYTES = 256


class GPT(nn.Module):
    """Logits of the next byte after every byte: x (b, t) -> (b, t, 256)."""

    def __init__(self, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed: nn.Embedding = nn.Embedding(BYTES, dim)
        self.blocks: nn.ModuleList = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm: nn.RMSNorm = nn.RMSNorm(dim)
        self.lm_head: nn.Linear = nn.Linear(dim, BYTES, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.lm_head(self.norm(h))


class Block(nn.Module):
    """h + attention(norm h), then h + mlp(norm h); h (b, t, dim)."""

    attention_norm: nn.RMSNorm
    attention: Attention
    mlp_norm: nn.RMSNorm
    mlp: MLP

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(dim), Attention(dim, heads)
        self.mlp_norm, self.mlp = nn.RMSNorm(dim), MLP(dim)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attention(self.attention_norm(h))
        return h + self.mlp(self.mlp_norm(h))


class Attention(nn.Module):
    """Causal self-attention: every position looks at itself and what came before."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj: nn.Linear = nn.Linear(dim, dim, bias=False)
        self.k_proj: nn.Linear = nn.Linear(dim, dim, bias=False)
        self.v_proj: nn.Linear = nn.Linear(dim, dim, bias=False)
        self.o_proj: nn.Linear = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, h, t, dim / h)


class MLP(nn.Module):
    """down(relu(up x)²)"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up: nn.Linear = nn.Linear(dim, 4 * dim, bias=False)
        self.down: nn.Linear = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


def rotate(x: Tensor) -> Tensor:
    """Turn pairs of features by angles that grow with position (RoPE); x (b, h, t, d)."""
    t, d = x.shape[-2:]
    speed = 10_000 ** (-torch.arange(0, d, 2, device=x.device) / d)
    angle = torch.outer(torch.arange(t, device=x.device), speed)
    cos, sin = angle.cos(), angle.sin()
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)
