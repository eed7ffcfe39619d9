"""Forward and backward of a LoRA linear, over those of the frozen base, which wants dx alone.

`--device cuda` has the shapes of Llama 8B. `--own-time` counts the time of this one thread and not
the clock's, for a machine that others use: it says what the work costs, but not how it spreads.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter, thread_time

import peft
import torch
from common import Figure, Timer, interleave, ratios, report, timer
from torch import Tensor, nn

import peftlite as pl
from peftlite.kernels import lora_linear

RANK = 16
LAYERS = {"cpu": [(1024, 1024), (1024, 4096), (4096, 1024), (2048, 2048), (4096, 4096)]}
LAYERS["cuda"] = [(4096, 4096), (4096, 1024), (4096, 11008), (4096, 14336), (14336, 4096)]
TOKENS = {"cpu": [1024], "cuda": [512, 4096, 8192, 16384]}
DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.bfloat16]}
BOUNDS = {("cpu", torch.float32): 1.10, ("cpu", torch.bfloat16): 1.25}
DROPOUTS = (0.0, 0.1)


@dataclass(frozen=True)
class Cell:
    """One point of the grid, whose tensors are random: zeros would be multiplied faster."""

    device: str
    dtype: torch.dtype
    i: int
    o: int
    tokens: int
    rank: int
    dropout: float

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} {self.i}->{self.o} t{self.tokens} r{self.rank} p{self.dropout:g}"

    def layer(self) -> nn.Linear:
        return nn.Linear(self.i, self.o, device=self.device, dtype=self.dtype)

    def rows(self, width: int) -> Tensor:
        return torch.randn(self.tokens, width, device=self.device, dtype=self.dtype)


class Unsloth(torch.autograd.Function):
    """LoRA as Unsloth does it, by its description: x alone is kept, and x Aᵀ is formed again.

    It has no dropout, and forms dY B for dA and for dx.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, a, b)
        a, b = a.to(x.dtype), b.to(x.dtype)
        return torch.addmm(bias, x, w.t()).addmm_(x @ a.t(), b.t())

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b = ctx.saved_tensors
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        db = dy.t() @ (x @ low_a.t())
        da = (dy @ low_b).t() @ x
        dx = (dy @ w).addmm_(dy @ low_b, low_a)
        return dx, None, None, da.to(a.dtype), db.to(b.dtype)


def factors(cell: Cell, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a = torch.randn(cell.rank, cell.i, device=cell.device, dtype=dtype) * cell.i**-0.5
    b = torch.randn(cell.o, cell.rank, device=cell.device, dtype=dtype)
    return a.requires_grad_(), b.requires_grad_()


def base(cell: Cell) -> nn.Module:
    return cell.layer().requires_grad_(False)


def with_peft(cell: Cell, widen: bool) -> nn.Module:
    config = peft.LoraConfig(
        r=cell.rank, lora_dropout=cell.dropout, target_modules=["0"], init_lora_weights=False
    )
    model = nn.Sequential(cell.layer())
    return peft.get_peft_model(model, config, autocast_adapter_dtype=widen).base_model.model[0]


def attached(cell: Cell) -> nn.Module:
    model = nn.Sequential(cell.layer())
    delta = pl.attach(model, pl.LoRA(rank=cell.rank, dropout=cell.dropout, targets="0"))
    for parameter in delta.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model[0]


def functional(cell: Cell) -> Callable[[Tensor], Tensor]:
    layer, (a, b) = base(cell), factors(cell, torch.float32)
    return lambda x: lora_linear(x, layer.weight, layer.bias, a, b, 1.0, cell.dropout)


def like_unsloth(cell: Cell) -> Callable[[Tensor], Tensor]:
    layer, (a, b) = base(cell), factors(cell, torch.float32)
    return lambda x: Unsloth.apply(x, layer.weight, layer.bias, a, b)


def contenders(cell: Cell) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name, what each of them runs. A merged delta is a base."""
    found = {"base": base(cell), "merged": base(cell), "peft": with_peft(cell, True)}
    if cell.dtype is not torch.float32:
        found["peft, adapters as the base"] = with_peft(cell, False)
    if not cell.dropout:
        found["Unsloth's way"] = like_unsloth(cell)
    return found | {"peftlite attached": attached(cell), "peftlite lora_linear": functional(cell)}


def step(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> None:
    torch.autograd.backward(layer(x), dy)
    x.grad = None
    for parameter in getattr(layer, "parameters", tuple)():
        parameter.grad = None


def once(call: Callable[[], object], clock: Callable[[], float]) -> Timer:
    def run() -> float:
        start = clock()
        call()
        return clock() - start

    return run


def measure(cell: Cell, rounds: int, own_time: bool) -> Iterator[Figure]:
    x, dy = cell.rows(cell.i).requires_grad_(), cell.rows(cell.o)
    clock = thread_time if own_time else perf_counter
    timers: dict[str, Timer] = {}
    for name, layer in contenders(cell).items():
        call = partial(step, layer, x, dy)
        timers[name] = timer(call, 0.02) if cell.device == "cuda" else once(call, clock)
    times = interleave(timers, rounds)
    yield Figure(f"{cell}, base", [seconds * 1e3 for seconds in times["base"]], "ms")
    for name in list(timers)[1:]:
        ours = name.startswith("peftlite") and not cell.dropout
        bound = BOUNDS.get((cell.device, cell.dtype)) if ours else None
        yield Figure(f"{cell}, {name}", ratios(times[name], times["base"]), at_most=bound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shape, and no CSV file")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--ranks", type=int, nargs="+", default=[RANK])
    parser.add_argument("--own-time", action="store_true", help="one thread, and its own time")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.own_time else args.threads)
    cells = [
        Cell(args.device, dtype, i, o, tokens, rank, dropout)
        for dtype in DTYPES[args.device]
        for i, o in LAYERS[args.device][: 1 if args.quick else None]
        for tokens in TOKENS[args.device][: 1 if args.quick else None]
        for rank in args.ranks
        for dropout in DROPOUTS
    ]
    rounds = 5 if args.quick else args.rounds
    report(
        "lora_linear" if args.device == "cpu" else "lora_linear_cuda",
        [figure for cell in cells for figure in measure(cell, rounds, args.own_time)],
        quick=args.quick,
        peft=peft.__version__,
        clock="own" if args.own_time else "wall",
    )


if __name__ == "__main__":
    main()
