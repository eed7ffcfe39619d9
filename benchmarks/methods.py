"""Forward and backward of every method on one layer, over the frozen base's and over LoRA's.

The base wants dx alone; on an embedding, which has none, it is a forward pass. A method that takes
none of a layer's sites has no line there. `--own-time` counts the time of this one thread and not
the clock's, for a machine that others use.
"""

import argparse
import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter, thread_time

import torch
from common import Figure, interleave, ratios, report
from lora_linear import once
from torch import Tensor, nn

import peftlite as pl

RANK = 16
METHODS: dict[str, pl.Method] = {
    "LoRA": pl.LoRA(rank=RANK),
    "LoRA, dropout 0.1": pl.LoRA(rank=RANK, dropout=0.1),
    "LoRA-FA": pl.LoRA(rank=RANK, freeze_a=True),
    "DoRA": pl.DoRA(rank=RANK),
    "AdaLoRA": pl.AdaLoRA(total_steps=1000),
    "VeRA": pl.VeRA(),
    "VBLoRA": pl.VBLoRA(),
    "LoHa": pl.LoHa(rank=RANK),
    "LoKr": pl.LoKr(rank=RANK),
    "FourierFT": pl.FourierFT(),
    "OFT": pl.OFT(),
    "BOFT": pl.BOFT(),
    "HRA": pl.HRA(),
    "IA3": pl.IA3(),
    "IA3, inputs": pl.IA3(feedforward=True),
    "BitFit": pl.BitFit(),
    "SparseMask 0.5 %": pl.SparseMask(fraction=0.005, select="random"),
    "SHiRA": pl.SHiRA(),
    "LTSFT": pl.LTSFT(steps=1000),
    "DiffPruning": pl.DiffPruning(steps=1000),
    "FullTuning": pl.FullTuning(),
    "BottleneckAdapter": pl.BottleneckAdapter(targets="0"),
    "Compacter": pl.Compacter(targets="0"),
    "LoReFT": pl.LoReFT(targets="0"),
}
FAST = ("LoRA", "DoRA", "IA3", "BitFit", "SparseMask 0.5 %", "SHiRA")
DORA_OVER_LORA = 1.15


@dataclass(frozen=True)
class Layer:
    """A layer, an input of it, and the methods to measure."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    methods: tuple[str, ...] = tuple(METHODS)
    bound: float | None = None  # of a DoRA step over a LoRA step

    def input(self, dtype: torch.dtype) -> Tensor:
        if self.name.startswith("embedding"):
            return torch.randint(100, self.shape)
        return torch.randn(self.shape, dtype=dtype, requires_grad=True)


def linear(width: int, tokens: int, methods: tuple[str, ...]) -> Layer:
    name, make = f"linear {width} t{tokens}", partial(nn.Linear, width, width)
    return Layer(name, make, (tokens, width), methods, DORA_OVER_LORA)


LAYERS = [
    linear(1024, 1024, tuple(METHODS)),
    linear(2048, 1024, FAST),
    linear(4096, 1024, FAST),
    Layer("conv 128 3x3", partial(nn.Conv2d, 128, 128, 3, padding=1), (8, 128, 28, 28)),
    Layer("embedding 32000 x 512", partial(nn.Embedding, 32000, 512), (1024,), FAST),
]
QUICK = [linear(64, 16, tuple(METHODS))]


def attached(layer: nn.Module, method: pl.Method) -> nn.Module | None:
    """A copy of the layer with a method in it that makes a difference, if it takes such layers."""
    model = nn.Sequential(copy.deepcopy(layer))
    if isinstance(layer, nn.Embedding):  # which no method takes unasked
        method = dataclasses.replace(method, targets="0")
    try:
        delta = pl.attach(model, method)
    except pl.PeftliteError:
        return None
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model


def step(model: nn.Module, x: Tensor, dy: Tensor) -> None:
    y = model(x)
    if y.requires_grad:
        torch.autograd.backward(y, dy)
    x.grad = None
    for parameter in model.parameters():
        parameter.grad = None


def measure(layer: Layer, dtype: torch.dtype, rounds: int, own_time: bool) -> Iterator[Figure]:
    base = layer.make().to(dtype).requires_grad_(False)
    x = layer.input(dtype)
    dy = torch.randn_like(base(x))
    found = {name: attached(base, METHODS[name]) for name in layer.methods}
    models = {"base": base} | {name: model for name, model in found.items() if model is not None}
    clock = thread_time if own_time else perf_counter
    timers = {name: once(partial(step, model, x, dy), clock) for name, model in models.items()}
    times = interleave(timers, rounds)
    cell = f"{layer.name} {str(dtype).removeprefix('torch.')}"
    yield Figure(f"{cell}, base", [seconds * 1e3 for seconds in times["base"]], "ms")
    for name in list(models)[1:]:
        yield Figure(f"{cell}, {name} / base", ratios(times[name], times["base"]))
        if name != "LoRA":
            bound = layer.bound if name == "DoRA" else None
            over = ratios(times[name], times["LoRA"])
            yield Figure(f"{cell}, {name} / LoRA", over, at_most=bound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small layer, and no CSV file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--own-time", action="store_true", help="one thread, and its own time")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.own_time else args.threads)
    figures = [
        figure
        for layer in (QUICK if args.quick else LAYERS)
        for dtype in (torch.float32, torch.bfloat16)
        for figure in measure(layer, dtype, 3 if args.quick else args.rounds, args.own_time)
    ]
    report("methods", figures, quick=args.quick, clock="own" if args.own_time else "wall")


if __name__ == "__main__":
    main()
