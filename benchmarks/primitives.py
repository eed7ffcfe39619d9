"""The parts of the low-rank path on a GPU, each against what its bytes cost; see NOTES.md.

Without a GPU it prints what is predicted for an H200 and measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from common import Figure, Timer, arguments, interleave, ratios, report, timer, until_told
from torch import Tensor

from peftlite.kernels import torch_ops
from peftlite.table import table

ON_GPU = torch.cuda.is_available()
BYTES, FLOPS = 4.3e12, 790e12  # a second, that an H200 reaches
COLD = 200e6  # bytes, that are more than its cache holds
ROUNDS = 21
LAYERS = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]
TOKENS = [16, 512, 4096, 8192]
RANK = 16

Call = Callable[[], object]


@dataclass(frozen=True)
class Cell:
    """A linear map's shape; its tensors are random, since zeros are multiplied faster."""

    tokens: int
    i: int
    o: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"t{self.tokens} {self.i}->{self.o} r{RANK}"

    def rows(self, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.random(self.tokens, columns, dtype=dtype)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device="cuda" if ON_GPU else "cpu").to(dtype or self.dtype)

    def bytes(self) -> dict[str, float]:
        """What each part has to read and write at the least."""
        x, y, low = (2 * self.tokens * n for n in (self.i, self.o, 2 * RANK))
        a, b = 4 * RANK * self.i, 4 * RANK * self.o
        return {
            "copy": 2 * y,
            "shrink": x + a + low,
            "grad_ab": y + 2 * b + 2 * low,
            "grad_a": x + 2 * a + low,
            "expand": y + b + low,
            "rescale": 2 * y,
        }

    def product(self) -> float:
        """Seconds of x Wᵀ, by its arithmetic or its bytes."""
        moved = 2 * (self.tokens * (self.i + self.o) + self.i * self.o)
        return max(2 * self.tokens * self.i * self.o / FLOPS, moved / BYTES)


def many(make: Callable[[], Call], moved: float) -> list[Call]:
    """The same call on tensors of its own, often enough that none is in the cache."""
    return [make() for _ in range(min(64, max(2, math.ceil(COLD / moved))))]


def timed(calls: list[Call], warm: bool = False) -> Timer:
    """Seconds of one call, in a graph that holds all of them, so that no launch counts.

    Their results each have memory of their own, unless that is to be warm.
    """
    if not ON_GPU:
        return timer(lambda: [call() for call in calls])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = []
        for call in calls:
            results = [call()] if warm else [*results, call()]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls)

    return run


def parts(cell: Cell) -> dict[str, Callable[[], Call]]:
    """Makers of calls: every kernel that memory bounds, as it is used, with factors of fp32."""
    from peftlite.kernels.triton import ops as triton_ops
    from peftlite.kernels.triton import rescale as triton_rescale

    wide, seed = torch.float32, torch.zeros((), dtype=torch.int64, device=cell.random(1).device)
    a, b = cell.random(RANK, cell.i, dtype=wide), cell.random(cell.o, RANK, dtype=wide)
    h, change = cell.rows(RANK, wide), cell.random(cell.o, dtype=wide)

    def copy() -> Call:
        y, to = cell.rows(cell.o), cell.rows(cell.o)
        return lambda: to.copy_(y)

    def shrink(dropout: float) -> Call:
        x = cell.rows(cell.i)
        return lambda: triton_ops.shrink(x, a, 1.0, dropout, seed)

    def grad_ab() -> Call:
        dy = cell.rows(cell.o)
        return lambda: triton_ops.grad_ab(dy, h, b, 1.0, 0.0)

    def grad_a(dropout: float) -> Call:
        x = cell.rows(cell.i)
        return lambda: triton_ops.grad_a(h, x, dropout, seed)

    def rescale() -> Call:
        y = cell.rows(cell.o)
        return lambda: triton_rescale.rescale(y, change, None)

    return {
        "copy": copy,
        "shrink": lambda: shrink(0.0),
        "shrink, dropout": lambda: shrink(0.1),
        "grad_ab": grad_ab,
        "grad_a": lambda: grad_a(0.0),
        "grad_a, dropout": lambda: grad_a(0.1),
        "expand": lambda: lambda: triton_ops.expand(h, b.t(), None, 0.0, None, cell.dtype),
        "rescale": rescale,
    }


def bandwidth(cell: Cell, rounds: int) -> Iterator[Figure]:
    """What share of its bytes' time each kernel takes, cold; and `expand` when all is in cache."""
    moved, made = cell.bytes(), parts(cell)
    timers = {name: timed(many(make, moved[name.split(",")[0]])) for name, make in made.items()}
    timers["expand, warm"] = timed([made["expand"]()] * 8, warm=True)
    for name, seconds in interleave(timers, rounds).items():
        floor = moved[name.split(",")[0]] / BYTES
        yield Figure(f"{cell}, {name}", [s * 1e6 for s in seconds], "us")
        yield Figure(f"{cell}, {name}, over its bytes", [s / floor for s in seconds])


def products(cell: Cell, rounds: int) -> Iterator[Figure]:
    """Over a plain x Wᵀ: one that adds to y; and x Wᵀ + h U, in two steps and fused."""
    from candidates import fused_product

    from peftlite.kernels.triton import ops as triton_ops

    w, b = cell.random(cell.o, cell.i), cell.random(cell.o, RANK, dtype=torch.float32)
    h, moved = cell.rows(RANK, torch.float32), 2 * cell.tokens * (cell.i + cell.o)

    def over(call: Callable[[Tensor, Tensor], object]) -> Timer:
        def make() -> Call:
            x, y = cell.rows(cell.i), cell.rows(cell.o)
            return lambda: call(x, y)

        return timed(many(make, moved))

    def before(x: Tensor) -> Tensor:
        return triton_ops.expand(h, b.t(), None, 0.0, None, cell.dtype).addmm_(x, w.t())

    timers = {
        "mm": over(lambda x, y: torch.mm(x, w.t(), out=y)),
        "addmm_": over(lambda x, y: y.addmm_(x, w.t())),
        "h U, then addmm_": over(lambda x, y: before(x)),
        "mm, then h U": over(lambda x, y: triton_ops.product(x, w.t(), h, b.t(), None, 0.0, None)),
        "torch's": over(lambda x, y: torch_ops.product(x, w.t(), h, b.t(), None, 0.0, None)),
    }
    for config in fused_product.CONFIGS:
        name = "fused {TOKENS}x{COLUMNS}".format(**config)
        timers[name] = over(
            lambda x, y, config=config: fused_product.product(
                x, w.t(), h, b.t(), None, 0.0, None, config
            )
        )
    times = interleave(timers, rounds)
    yield Figure(f"{cell}, mm", [s * 1e6 for s in times["mm"]], "us")
    for name in list(timers)[1:]:
        yield Figure(f"{cell}, {name}, over mm", ratios(times[name], times["mm"]))
        if name.startswith("fused"):
            two_steps = ratios(times[name], times["mm, then h U"])
            yield Figure(f"{cell}, {name}, over mm, then h U", two_steps)


def predicted(cells: list[Cell]) -> str:
    """Microseconds on an H200, for what is bound by memory and for the product."""
    rows = []
    for cell in cells:
        micro = [seconds / BYTES * 1e6 for seconds in cell.bytes().values()]
        rows.append([str(cell), *(f"{us:.1f}" for us in (*micro, cell.product() * 1e6))])
    return table(["predicted, us", *cells[0].bytes(), "x Wt"], rows)


def main() -> None:
    quick = arguments(__doc__).quick
    cells = [Cell(tokens, i, o) for i, o in LAYERS for tokens in TOKENS]
    cells = cells[1:2] if quick else cells
    print(predicted(cells))
    if not ON_GPU:
        print("there is no GPU: nothing is measured")
        return
    rounds = 5 if quick else ROUNDS
    figures = (f for cell in cells for part in (bandwidth, products) for f in part(cell, rounds))
    report("primitives", until_told(figures), quick=quick)


if __name__ == "__main__":
    main()
