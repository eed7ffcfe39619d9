"""A step of experts kept in 3-D parameters over the frozen ones', beside peft's target_parameters.

The three ways in which transformers runs them: a loop over experts, a grouped product of tokens
that are sorted by expert, and a batched one with a matrix for each token. A block is Qwen's: gate
and up in one parameter, then down. Outputs are compared with fp64 first. Memory is the most
that a step's results hold at once, less the frozen block's, the inputs of the products, which dA
needs, and the gradients that the step is for; in numbers of fp32 for a token, rank, expert that it
hits, and parameter. Time is this one thread's own.
"""

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from time import thread_time

import peft
import torch
import torch.nn.functional as F
from common import Figure, interleave, ratios, report
from comparison.run import Peak
from lora_linear import once
from torch import Tensor, nn

import peftlite as pl
from peftlite.bank import DeltaBank

RANK, HIT = 16, 2
ROWS, DELTAS = 16, 4  # of a batch, and of a bank
SHAPES = {"8 x 1024 x 1024": (8, 1024, 1024), "64 x 1024 x 256": (64, 1024, 256)}
SLOWER, NUMBERS = 1.3, 1.0  # bounds


class Experts(nn.Module):
    """y (t, i) of x (t, i) and the experts (t,) of each, in order; i inputs, f hidden."""

    def __init__(self, e: int, i: int, f: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(e, 2 * f, i) / i**0.5)
        self.down_proj = nn.Parameter(torch.randn(e, i, f) / f**0.5)

    def times(self, x: Tensor, name: str, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        gate, up = self.times(x, "gate_up_proj", ids).chunk(2, -1)
        return self.times(F.silu(gate) * up, "down_proj", ids)


class Loop(Experts):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in ids.unique():
            rows = torch.where(ids == e)[0]
            gate, up = F.linear(x[rows], self.gate_up_proj[e]).chunk(2, -1)
            y.index_add_(0, rows, F.linear(F.silu(gate) * up, self.down_proj[e]))
        return y


class Grouped(Experts):
    def times(self, x: Tensor, name: str, ids: Tensor) -> Tensor:
        w = getattr(self, name)
        ends = torch.bincount(ids, minlength=len(w)).cumsum(0).int()
        return F.grouped_mm(x, w.transpose(-2, -1), offs=ends)


class Batched(Experts):
    def times(self, x: Tensor, name: str, ids: Tensor) -> Tensor:
        return torch.bmm(getattr(self, name)[ids], x[..., None])[..., 0]


WAYS: dict[str, tuple[type[Experts], int]] = {  # and tokens
    "loop": (Loop, 512),
    "grouped": (Grouped, 512),
    "batched": (Batched, 8),
}


class Mixture(nn.Module):
    """Experts of a batch x (b, t, i), and ids (b, t, h) of those that each token has."""

    def __init__(self, experts: type[Experts], *sides: int):
        super().__init__()

        class Routed(experts):  # as transformers': of tokens, and an index
            def forward(self, x: Tensor, top_k_index: Tensor) -> Tensor:
                ids, order = top_k_index.flatten(), top_k_index.flatten().argsort()
                y = super().forward(x[order // HIT], ids[order])
                return torch.zeros_like(x).index_add_(0, order // HIT, y)

        self.experts = Routed(*sides)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.experts(x.flatten(0, 1), ids.flatten(0, 1)).view(x.shape)


def of_a_bank(name: str, shape: str, dtype: torch.dtype, rounds: int) -> Iterator[Figure]:
    """A step of a batch whose rows have one of some deltas each, over the frozen block's."""
    (way, tokens), (e, i, f) = WAYS[name], SHAPES[shape]
    method = pl.LoRA(rank=RANK, dtype=torch.float32, targets="experts.*_proj")
    each = max(1, tokens // ROWS)
    base = Mixture(way, e, i, f).to(dtype).requires_grad_(False)
    bank = DeltaBank(copy.deepcopy(base), DELTAS, RANK, method)
    for k in range(DELTAS):
        delta = pl.attach(copy.deepcopy(base), method, name=f"d{k}")
        for parameter in delta.parameters():
            nn.init.normal_(parameter, std=0.02)
        bank.load(delta.name, delta)
    x = torch.randn(ROWS, each, i, dtype=dtype).requires_grad_()
    ids, dy = torch.randint(e, (ROWS, each, HIT)), torch.randn_like(x)
    names = [f"d{k % DELTAS}" for k in range(ROWS)]

    def of_rows() -> None:
        with bank.train(names):
            step(bank.model, x, ids, dy)
        for name in set(names):
            for parameter in bank.parameters(name):
                parameter.grad = None

    steps = {"base": partial(step, base, x, ids, dy), "bank": of_rows}
    times = interleave({name: once(run, thread_time) for name, run in steps.items()}, rounds)
    cell = f"{name} {shape} {str(dtype).removeprefix('torch.')}, a bank of {DELTAS}"
    yield Figure(cell, ratios(times["bank"], times["base"]), at_most=SLOWER)


def contenders(base: Experts) -> dict[str, nn.Module]:
    """The frozen block, and with factors that are the same in both libraries' layouts or not."""
    found: dict[str, nn.Module] = {"base": base.requires_grad_(False)}
    ours = copy.deepcopy(base)
    pl.attach(ours, pl.LoRA(rank=RANK, targets=["gate_up_proj", "down_proj"]))
    config = peft.LoraConfig(
        r=RANK, target_modules=[], target_parameters=["0.gate_up_proj", "0.down_proj"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no module is a target
        theirs = peft.get_peft_model(One(copy.deepcopy(base)), config)  # type: ignore[arg-type]
    found |= {"peftlite": ours, "peft": theirs}
    for model in (ours, theirs):
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.02)
    return found


class One(nn.Sequential):
    """A block as the only module of a model, which peft wants to have."""

    def forward(self, *args: Tensor) -> Tensor:
        return self[0](*args)


def step(model: nn.Module, x: Tensor, ids: Tensor, dy: Tensor) -> None:
    torch.autograd.backward(model(x, ids), dy)
    x.grad = None
    for parameter in model.parameters():
        parameter.grad = None


@torch.no_grad()
def deviation(model: nn.Module, x: Tensor, ids: Tensor) -> float:
    """How far y is from a loop in fp64, over matrices that are formed."""
    exact = copy.deepcopy(model).double()
    pl.merge(exact, "default")
    true = Loop.forward(exact, x.double(), ids)  # type: ignore[arg-type]
    return float((model(x, ids) - true).norm() / true.norm())


def measure(name: str, shape: str, dtype: torch.dtype, rounds: int) -> Iterator[Figure]:
    (way, tokens), (e, i, f) = WAYS[name], SHAPES[shape]
    base = way(e, i, f).to(dtype)
    ids = torch.randint(e, (tokens * HIT,)).sort()[0]
    x = torch.randn(len(ids), i, dtype=dtype).requires_grad_()
    dy, models = torch.randn_like(x), contenders(base)
    cell = f"{name} {shape} {str(dtype).removeprefix('torch.')}"
    off = deviation(models["peftlite"], x, ids)
    assert off < (1e-5 if dtype is torch.float32 else 1e-2), f"{cell}: {off} off"
    yield Figure(f"{cell}, peftlite, error", [off] * 2, "")
    steps = {name: partial(step, model, x, ids, dy) for name, model in models.items()}
    times = interleave({name: once(run, thread_time) for name, run in steps.items()}, rounds)
    yield Figure(f"{cell}, base", [seconds * 1e3 for seconds in times["base"]], "ms")
    most = {name: peak(run) for name, run in steps.items()}
    for name in ("peftlite", "peft"):
        ours = name == "peftlite"
        bound = SLOWER if ours else None
        yield Figure(f"{cell}, {name}", ratios(times[name], times["base"]), at_most=bound)
        learned = [p for p in models[name].parameters() if p.requires_grad]
        needed = len(ids) * (i + f) * x.itemsize + sum(p.nbytes for p in learned)
        numbers = (most[name] - most["base"] - needed) / (2 * len(ids) * RANK * 4)
        bound = NUMBERS if ours else None
        yield Figure(f"{cell}, {name}, memory", [numbers] * 2, "numbers", at_most=bound)


def peak(run: Callable[[], None]) -> int:
    with Peak() as seen:
        run()
    return seen.most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one shape, and no CSV file")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shapes = [*SHAPES][: 1 if args.quick else None]
    figures = [
        figure
        for dtype, name, shape in product((torch.float32, torch.bfloat16), WAYS, shapes)
        for about in (measure, of_a_bank)
        for figure in about(name, shape, dtype, 2 if args.quick else args.rounds)
    ]
    report("experts", figures, quick=args.quick, clock="own", peft=peft.__version__)


if __name__ == "__main__":
    main()
