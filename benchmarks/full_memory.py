"""Peak memory of a training step: LoRA against full fine-tuning with AdamW, by the weights' bytes.

Each in a process of its own, on a transformer of 302 million parameters and 16 tokens, so that
weights dominate: gradients and the optimizer's state are seen, activations hardly. What is counted
is the peak of the resident memory over what the process held before the model was made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from common import Figure, arguments, report
from held import forget, most, resident
from torch import Tensor, nn

import peftlite as pl

LARGE, SMALL = (1024, 24), (64, 2)  # width, blocks
TOKENS, STEPS = 16, 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Block(nn.Module):
    """h + attention(norm h), then h + mlp(norm h); h (b, t, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        x = self.attention_norm(h)
        q, k, v = (f(x).unflatten(-1, (-1, 64)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.o(y.transpose(1, 2).flatten(-2))
        return h + self.down(F.gelu(self.up(self.mlp_norm(h))))


Start = Callable[[nn.Module], Iterable[nn.Parameter]]


def _everything(model: nn.Module) -> Iterable[nn.Parameter]:
    return model.parameters()


def _nothing(model: nn.Module) -> Iterable[nn.Parameter]:
    model.requires_grad_(False)
    return ()


def _lora(model: nn.Module) -> Iterable[nn.Parameter]:
    return pl.attach(model, pl.LoRA(rank=8)).parameters()


def _full(model: nn.Module) -> Iterable[nn.Parameter]:
    return pl.attach(model, pl.FullTuning(targets="*")).parameters()


CONTENDERS: Mapping[str, Start] = {
    "base, forward alone": _nothing,
    "LoRA r8": _lora,
    "all weights, plain torch": _everything,
    "pl.FullTuning": _full,  # which keeps the base, and trains in fp32
}


def peak(contender: str, dtype: str, shape: tuple[int, int]) -> float:
    """The most bytes that training holds, over the bytes of the model's weights."""
    torch.set_num_threads(1)
    steps(CONTENDERS[contender], _model(SMALL, DTYPES[dtype]))
    before = resident()
    forget()
    model = _model(shape, DTYPES[dtype])
    weights = sum(p.nbytes for p in model.parameters())
    steps(CONTENDERS[contender], model)
    return (most() - before) / weights


def _by_itself(contender: str, dtype: str, shape: tuple[int, int]) -> float:
    """The same in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(peak, contender, dtype, shape).result()


def _model(shape: tuple[int, int], dtype: torch.dtype) -> nn.Module:
    width, blocks = shape
    with torch.device("meta"):
        model = nn.Sequential(*(Block(width) for _ in range(blocks))).to(dtype)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.02, 0.02)
    return model


def steps(start: Start, model: nn.Module) -> None:
    parameters = [*start(model)]
    first = next(model.parameters())
    x = torch.ones(1, TOKENS, first.shape[0], dtype=first.dtype)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None
    for _ in range(STEPS):
        loss = model(x).float().square().mean()
        if optimizer is not None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    args = arguments(__doc__)
    shape = SMALL if args.quick else LARGE
    figures = [
        # the same from one time to the next, but for a hundredth: once is enough
        Figure(f"{dtype}, {name}", [_by_itself(name, dtype, shape)] * 2)
        for dtype in DTYPES
        for name in CONTENDERS
    ]
    report("full_memory", figures, quick=args.quick)


if __name__ == "__main__":
    main()
