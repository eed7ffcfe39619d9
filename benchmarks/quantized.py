"""Packed layers beside the same in bf16, bitsandbytes' and torchao's: bytes, times and memory.

The layer is 4096² in bf16, frozen; a step is a forward pass and a backward one, which wants dx.
bitsandbytes' is in training mode but for one token, as its users have it; what isn't installed is
left out. `plain` is peftlite without its native kernels. Memory is the peak of two steps with AdamW
in a process of its own, over what was held before there was a model, on a transformer of 604
million parameters whose layers are packed as they are made. `--own-time` counts the time of one
thread and not the clock's, for a machine that others use.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context
from time import perf_counter, thread_time
from typing import Any

import peft
import torch
from common import Figure, interleave, ratios, report
from contenders import step
from full_memory import Block, steps
from held import forget, most, resident
from lora_linear import once
from torch import Tensor, nn

import peftlite as pl
from peftlite.kernels.native.kernels import KERNELS
from peftlite.quant.packing import pack

SIZE, RANK = 4096, 16
KINDS = ("nf4", "int8", "fp8")
TOKENS = (1, 16, 64, 512, 1024)
# how far what a layer gives is from bf16's, in norm
CLOSE = {"nf4": 0.11, "int8": 0.015, "fp8": 0.04, "bitsandbytes": 0.11, "torchao": 0.11}
# the most that a step may take of the bf16 layer's, by tokens: packed alone, and with LoRA on top
STEP, ADAPTED = {512: 1.25, 1024: 1.15}, {512: 1.35, 1024: 1.25}
MODEL, TINY = (2048, 12), (64, 2)  # width and blocks
LINEAR = ["q", "k", "v", "o", "up", "down"]

Calls = Mapping[str, Callable[[], object]]
Bounds = Mapping[str, float]


def optional(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        print(f"left out: {error}")
        return None


bitsandbytes = optional("bitsandbytes")
torchao = optional("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")


# -- layers


def plain(call: Callable[[], object]) -> Callable[[], object]:
    """The same without native kernels."""

    def run() -> None:
        libraries = [kernel.lib for kernel in KERNELS]
        for kernel in KERNELS:
            kernel.lib = None
        try:
            call()
        finally:
            for kernel, library in zip(KERNELS, libraries, strict=True):
                kernel.lib = library

    return run


def linear(w: Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(w.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer


def with_peftlite(w: Tensor, kind: str) -> nn.Module:
    model = nn.Sequential(linear(w))
    pl.quantize(model, kind, targets="*")
    return model


def with_bitsandbytes(w: Tensor) -> nn.Module:
    named: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    layer = bitsandbytes.nn.Linear4bit(
        *reversed(w.shape), bias=False, device="meta", compute_dtype=w.dtype, **named
    )
    layer.weight = bitsandbytes.nn.Params4bit(w, requires_grad=False, **named)
    return layer.to("cpu")


class WithTorchao(nn.Module):
    def __init__(self, w: Tensor):
        super().__init__()
        self.packed = torchao.to_nf4(w)

    def forward(self, x: Tensor) -> Tensor:
        return torchao.linear_nf4(x, self.packed)


def layers(w: Tensor) -> dict[str, nn.Module]:
    """The packed ones, by whose they are or by their kind, none of them off."""
    found: dict[str, nn.Module] = {kind: with_peftlite(w, kind) for kind in KINDS}
    if bitsandbytes:
        found["bitsandbytes"] = with_bitsandbytes(w.clone())
    if torchao:
        found["torchao"] = WithTorchao(w)
    x = torch.randn(16, SIZE, dtype=w.dtype)
    true = x.double() @ w.double().t()
    for name, layer in found.items():
        error = float((layer(x) - true).norm() / true.norm())
        assert error < CLOSE[name], f"{name}: {error} off"
    return found


def adapted(w: Tensor) -> dict[str, nn.Module]:
    """Layers with LoRA on top."""
    found = {"bf16": nn.Sequential(linear(w)), "nf4": with_peftlite(w, "nf4")}
    for model in found.values():
        pl.attach(model, pl.LoRA(rank=RANK, targets="*"))
    if bitsandbytes:
        model: Any = nn.Sequential(with_bitsandbytes(w.clone()))
        found["bitsandbytes"] = peft.get_peft_model(
            model, peft.LoraConfig(r=RANK, target_modules=["0"])
        )
    return found


# -- times


class Clock:
    """Times calls in turns, for as long as it was asked to."""

    def __init__(self, args: argparse.Namespace):
        self.own, self.seconds, self.quick = args.own_time, args.seconds, args.quick

    def __call__(self, what: str, calls: Calls) -> tuple[list[Figure], dict[str, list[float]]]:
        now = thread_time if self.own else perf_counter
        timers = {name: once(call, now) for name, call in calls.items()}
        first = interleave(timers, 1)
        rounds = min(41, max(7, round(self.seconds / sum(first[name][0] for name in timers))))
        times = interleave(timers, 3 if self.quick else rounds)
        each = {name: [seconds * 1e3 for seconds in found] for name, found in times.items()}
        return [Figure(f"{what}, {name}", found, "ms") for name, found in each.items()], times


def both(what: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Calls of peftlite's with native kernels and without; others' as they are."""
    without = {f"{name}, plain": plain(call) for name, call in what.items() if name in KINDS}
    return {**what, **without}


def ahead(what: str, times: Mapping[str, list[float]], least: Bounds) -> Iterator[Figure]:
    """How many times as long as ours bitsandbytes takes."""
    for name, bound in least.items():
        if "bitsandbytes" in times and name in times:
            found = ratios(times["bitsandbytes"], times[name])
            yield Figure(f"{what}, bitsandbytes / {name}", found, at_least=bound)


def over(what: str, times: Mapping[str, list[float]], most: Bounds) -> Iterator[Figure]:
    """What each takes of bf16's time."""
    for name, found in times.items():
        if name != "bf16":
            yield Figure(f"{what}, {name}", ratios(found, times["bf16"]), at_most=most.get(name))


def packing(what: str, clock: Clock, w: Tensor) -> Iterator[Figure]:
    calls: dict[str, Callable[[], object]] = {kind: partial(pack, w, kind) for kind in KINDS}
    if bitsandbytes:
        named = {"quant_type": "nf4", "compress_statistics": True}
        calls["bitsandbytes"] = partial(bitsandbytes.functional.quantize_4bit, w, **named)
    if torchao:
        calls["torchao"] = partial(torchao.to_nf4, w)
    figures, times = clock(f"{what}, quantise", calls)
    yield from figures
    yield from ahead(f"{what}, quantise", times, {"nf4": 3})


def forming(what: str, clock: Clock, w: Tensor) -> Iterator[Figure]:
    out = torch.empty_like(w)
    packed = {kind: pack(w, kind) for kind in KINDS}
    calls: dict[str, Callable[[], object]] = {
        kind: partial(how.unpack, parts, out) for kind, (how, parts) in packed.items()
    }
    calls["copy"] = lambda: out.copy_(w)
    if bitsandbytes:
        theirs = bitsandbytes.functional.quantize_4bit(
            w, quant_type="nf4", compress_statistics=True
        )
        calls["bitsandbytes"] = partial(bitsandbytes.functional.dequantize_4bit, *theirs)
    if torchao:
        calls["torchao"] = torchao.to_nf4(w).get_original_weight
    figures, times = clock(f"{what}, dequantise", both(calls))
    yield from figures
    yield from ahead(f"{what}, dequantise", times, {"nf4": 3.5, "nf4, plain": 1.3})


def stepping(what: str, clock: Clock, w: Tensor) -> Iterator[Figure]:
    alone, with_lora = {"bf16": linear(w), **layers(w)}, {"bf16": linear(w), **adapted(w)}
    for tokens in TOKENS:
        x = torch.randn(tokens, SIZE, dtype=w.dtype, requires_grad=True)
        dy = torch.randn(tokens, SIZE, dtype=w.dtype)
        for more, found, allowed in (("", alone, STEP), (" with LoRA", with_lora, ADAPTED)):
            named = f"{what}, step of {tokens}{more}"
            calls = {name: partial(step, layer, x, dy) for name, layer in found.items()}
            figures, times = clock(named, both(calls))
            bounds = (
                {"nf4": allowed[tokens], "nf4, plain": allowed[tokens]} if tokens in allowed else {}
            )
            yield from over(named, times, bounds)
            yield from ahead(named, times, {"nf4": 1, "nf4, plain": 1})
            yield figures[0]


@torch.no_grad()
def decoding(what: str, clock: Clock, w: Tensor) -> Iterator[Figure]:
    found = {name: layer.eval() for name, layer in {"bf16": linear(w), **layers(w)}.items()}
    x, named = torch.randn(1, SIZE, dtype=w.dtype), f"{what}, one token"
    figures, times = clock(named, both({name: partial(f, x) for name, f in found.items()}))
    yield from over(named, times, {"nf4": 0.35, "nf4, plain": 0.6})
    yield from ahead(named, times, {"nf4": 1})
    yield figures[0]


# -- bytes


def sizes(w: Tensor) -> Iterator[Figure]:
    for kind in KINDS:
        found = sum(part.nbytes for part in pack(w, kind)[1].values()) / w.numel()
        bound = 0.516 if kind == "nf4" else None
        yield Figure(f"bytes a weight, {kind}", [found] * 2, "B", at_most=bound)
    if bitsandbytes:
        layer = with_bitsandbytes(w.clone())
        state = layer.state_dict(keep_vars=True)
        found = sum(part.nbytes for part in state.values()) / w.numel()
        yield Figure("bytes a weight, bitsandbytes", [found] * 2, "B")


def grow(contender: str, width: int, blocks: int) -> nn.Module:
    """A model whose layers are packed as they are made."""
    with torch.device("meta"):
        model = nn.Sequential(*(Block(width) for _ in range(blocks)))
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.RMSNorm):
                child.weight = nn.Parameter(torch.ones(width, dtype=torch.bfloat16))
            elif isinstance(child, nn.Linear):
                w = torch.empty(child.weight.shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
                setattr(module, name, MAKE[contender](w))
    return model.requires_grad_(False)


MAKE: dict[str, Callable[[Tensor], nn.Module]] = {
    "bf16": linear,
    "nf4": lambda w: with_peftlite(w, "nf4")[0],
    "int8": lambda w: with_peftlite(w, "int8")[0],
    "bitsandbytes": with_bitsandbytes,
}


def tune(contender: str, model: Any) -> list[nn.Parameter]:
    if contender == "bitsandbytes":
        peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=LINEAR))
        return [p for p in model.parameters() if p.requires_grad]
    return [*pl.attach(model, pl.LoRA(rank=8, targets=LINEAR)).parameters()]


def peak(contender: str, shape: tuple[int, int]) -> int:
    """The most bytes that a model in training holds."""
    torch.set_num_threads(1)
    steps(partial(tune, contender), grow(contender, *TINY))
    before = resident()
    model = grow(contender, *shape)
    forget()
    steps(partial(tune, contender), model)
    return most() - before


def by_itself(contender: str, shape: tuple[int, int]) -> int:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(peak, contender, shape).result()


def memory(quick: bool) -> Iterator[Figure]:
    names = [name for name in MAKE if name != "bitsandbytes" or bitsandbytes]
    found = {name: by_itself(name, TINY if quick else MODEL) for name in names}
    for name in names:
        yield Figure(f"memory, {name} and LoRA", [found[name] / 2**20] * 2, "MiB")
        if name != "bf16":
            share, bound = found[name] / found["bf16"], 0.35 if name == "nf4" else None
            yield Figure(f"memory, {name} and LoRA over bf16's", [share] * 2, at_most=bound)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, and no CSV file")
    parser.add_argument("--own-time", action="store_true", help="one thread, and its own time")
    parser.add_argument("--seconds", type=float, default=8, help="that each comparison takes")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    w = torch.randn(SIZE, SIZE).mul_(0.02).bfloat16()
    found = " ".join(kernel.name for kernel in KERNELS if kernel.ready()) or "none"
    figures = [*sizes(w), *memory(args.quick)]
    # one thread last, which is what the file's lines say of the machine
    for threads in (1,) if args.own_time else (2, 1):
        torch.set_num_threads(threads)
        for part in (packing, forming, stepping, decoding):
            figures += part(f"{threads} thread{'s' * (threads > 1)}", Clock(args), w)
    report(
        "quantized",
        figures,
        quick=args.quick,
        peft=peft.__version__,
        bitsandbytes=getattr(bitsandbytes, "__version__", "none"),
        torchao=version("torchao") if torchao else "none",
        native=found,
        clock="own" if args.own_time else "wall",
    )


if __name__ == "__main__":
    main()
