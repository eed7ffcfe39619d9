"""Forward and backward of a LoRA linear, over those of the frozen base, which wants dx alone.

Each contender is first compared with fp64, then timed, in turns; what it keeps stands beside. Every
cell of the grid takes about `--seconds`, in 7 rounds or more. `--device cuda` has the shapes of
Llama 8B, inputs that the L2 cache doesn't hold (`--warm`: that it may), and the forward pass alone.
`--own-time` counts the time of this one thread and not the clock's, for a machine that others use:
it says what the work costs, but not how it spreads. `--busy 2` has two processes multiply matrices
meanwhile, and ends them.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, product
from time import perf_counter, thread_time

import peft
import torch
from common import Figure, Timer, interleave, named, ratios, report, timer, until_told
from contenders import DROPOUTS, DTYPES, RANK, Cell, Given, Layer, contenders, deviation, step
from memory import weigh
from torch import Tensor

from peftlite.kernels.native.kernels import KERNELS

LAYERS = {"cpu": [(1024, 1024), (1024, 4096), (4096, 1024), (2048, 2048), (4096, 4096)]}
LAYERS["cuda"] = [(4096, 4096), (4096, 1024), (4096, 11008), (4096, 14336), (14336, 4096)]
TOKENS = {"cpu": [1024], "cuda": [512, 4096, 8192, 16384]}
RANKS = {"cpu": [RANK], "cuda": [8, 16, 64, 128]}
BOUNDS = {("cpu", torch.float32): 1.10, ("cpu", torch.bfloat16): 1.25}
# the linear layers of a block of Llama 8B: q and o, k and v, gate and up, down
MIX = {(4096, 4096): 2, (4096, 1024): 2, (4096, 14336): 2, (14336, 4096): 1}
L2 = 2**26  # bytes, more than the cache of a GPU has
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

Times = dict[str, list[float]]


def once(call: Callable[[], object], clock: Callable[[], float]) -> Timer:
    def run() -> float:
        start = clock()
        call()
        return clock() - start

    return run


def timers(cell: Cell, layers: dict[str, Layer], args: argparse.Namespace) -> dict[str, Timer]:
    each = max(cell.i, cell.o) * cell.tokens * cell.dtype.itemsize
    pairs = 1 if args.device == "cpu" or args.warm else 1 + L2 // each
    inputs = [(cell.rows(cell.i).requires_grad_(), cell.rows(cell.o)) for _ in range(pairs)]
    clock = thread_time if args.own_time else perf_counter

    def timed(layer: Layer, run: Callable[..., object]) -> Timer:
        turns = cycle(inputs)

        def call() -> None:
            run(layer, *next(turns))

        return timer(call, 0.02) if args.device == "cuda" else once(call, clock)

    found = {name: timed(layer, step) for name, layer in layers.items()}
    if args.device == "cuda":
        found |= {f"{name}, forward": timed(layer, _forward) for name, layer in layers.items()}
    return found


def _forward(layer: Layer, x: Tensor, _: Tensor) -> None:
    layer(x)


def measure(cell: Cell, args: argparse.Namespace) -> tuple[list[Figure], Times]:
    """The figures of one cell, and the seconds of each of its contenders."""
    given = Given(cell)
    compiled = not (args.quick or args.eager or cell.dropout)
    layers = contenders(given, compiled=compiled)
    x, dy = cell.rows(cell.i).requires_grad_(), cell.rows(cell.o)
    figures: list[Figure] = []
    for name, layer in layers.items():
        if not cell.dropout:
            error = deviation(given, layer)
            assert error < CLOSE[cell.dtype], f"{cell}, {name}: {error} off"
            figures.append(Figure(f"{cell}, {name}, error", [error] * 2, ""))
        figures += weigh(cell, name, layer, x, dy)
    del x, dy
    run = timers(cell, layers, args)
    a_round = sum(interleave(run, 1)[name][0] for name in run)
    rounds = 5 if args.quick else min(41, max(7, round(args.seconds / a_round)))
    times = interleave(run, rounds)
    return [*_compared(cell, times, args.busy > 0), *figures], times


def _compared(cell: Cell, times: Times, busy: bool) -> Iterator[Figure]:
    yield Figure(f"{cell}, base", [seconds * 1e3 for seconds in times["base"]], "ms")
    for name in times:
        below = "base, forward" if name.endswith("forward") else "base"
        bounded = name == "peftlite" and not cell.dropout and not busy
        bound = BOUNDS.get((cell.device, cell.dtype)) if bounded else None
        if name != below:
            yield Figure(f"{cell}, {name}", ratios(times[name], times[below]), at_most=bound)
    for kind in ("", ", half adapters"):
        ours, theirs = f"peftlite{kind}", f"peft{kind}"
        if ours in times:
            ahead = ratios(times[theirs], times[ours])
            yield Figure(f"{cell}, {theirs} / {ours}", ahead, at_least=1)


def mixed(times: dict[Cell, Times]) -> Iterator[Figure]:
    """The layers of a Llama block together, where all were measured."""
    groups: dict[tuple, dict[Cell, Times]] = {}
    for cell, found in times.items():
        if (cell.i, cell.o) in MIX:
            group = groups.setdefault((cell.dtype, cell.tokens, cell.rank, cell.dropout), {})
            group[cell] = found
    for (_, tokens, rank, dropout), group in groups.items():
        if len(group) < len(MIX):
            continue
        whole = {name: _total(group, name) for name in next(iter(group.values()))}
        for name in [name for name in whole if name != "base" and not name.endswith("forward")]:
            bound = 1.12 if name == "peftlite" and rank == RANK and not dropout else None
            what = f"Llama 8B mix t{tokens} r{rank} p{dropout:g}, {name}"
            yield Figure(what, ratios(whole[name], whole["base"]), at_most=bound)


def _total(group: dict[Cell, Times], name: str) -> list[float]:
    rounds = zip(*(times[name] for times in group.values()), strict=False)
    weights = [MIX[cell.i, cell.o] for cell in group]
    return [sum(w * t for w, t in zip(weights, each, strict=True)) for each in rounds]


BUSY = """
import os, torch
torch.set_num_threads(1)
a = torch.randn(1024, 1024)
while os.getppid() == {parent}:
    a @ a
"""


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes beside this one that multiply matrices on a thread each, and end with it."""
    command = [sys.executable, "-c", BUSY.format(parent=os.getpid())]
    started = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shape, and no CSV file")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--ranks", type=int, nargs="+", help="16 on a CPU, 8 to 128 on a GPU")
    parser.add_argument("--tokens", type=int, nargs="+", help="1024; on a GPU, 512 to 16384")
    parser.add_argument("--eager", action="store_true", help="nothing that is compiled first")
    parser.add_argument("--warm", action="store_true", help="inputs may stay in the L2 cache")
    parser.add_argument("--label", help="for another machine: what the CSV file's name ends with")
    parser.add_argument("--busy", type=int, default=0, help="processes that multiply meanwhile")
    parser.add_argument("--own-time", action="store_true", help="one thread, and its own time")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1 if args.own_time else args.threads)
    torch.manual_seed(0)
    few = 1 if args.quick else None
    grid = product(
        DTYPES[args.device],
        LAYERS[args.device][:few],
        (args.tokens or TOKENS[args.device])[:few],
        (args.ranks or RANKS[args.device])[:few],
        DROPOUTS,
    )
    times: dict[Cell, Times] = {}

    def cells() -> Iterator[Figure]:
        for dtype, (i, o), tokens, rank, dropout in grid:
            cell = Cell(args.device, dtype, i, o, tokens, rank, dropout)
            found, times[cell] = measure(cell, args)
            yield from found

    with neighbours(args.busy):
        figures = until_told(cells())
    cuda, warm, busy = args.device == "cuda", args.warm, args.busy > 0
    report(
        named("lora_linear", cuda and "cuda", warm and "warm", busy and "busy", args.label),
        [*mixed(times), *figures],
        quick=args.quick,
        peft=peft.__version__,
        clock="own" if args.own_time else "wall",
        busy=str(args.busy),
        native=" ".join(kernel.name for kernel in KERNELS if kernel.ready()) or "none",
    )


if __name__ == "__main__":
    main()
