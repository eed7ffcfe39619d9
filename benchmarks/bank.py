"""Many deltas on one base: mixed batches, switches, swaps, a stream of requests, and threads.

`--device cuda` times decoding on blocks of Llama 8B's shape in a CUDA graph, against the bytes that
must move. `--own-time` counts the time of this one thread, for a machine that others use.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time

import peft
import torch
import torch.nn.functional as F
from common import Figure, Timer, differences, interleave, ratios, report, timer, until_told
from held import resident
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from torch._dynamo.utils import counters

import peftlite as pl
from peftlite.bank import DeltaBank

RANK, ROWS, DELTAS = 16, 32, 16
NAMES = [f"d{i}" for i in range(DELTAS)]


class Block(nn.Module):
    """A transformer's block without its attention's softmax: seven maps, as in a Llama."""

    def __init__(self, width: int, inner: int, kv: int):
        super().__init__()
        maps = {"q": (width, width), "k": (width, kv), "v": (width, kv), "o": (width, width)}
        maps |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
        for name, (i, o) in maps.items():
            self.add_module(name, nn.Linear(i, o, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        k, v = (F.pad(m(x), (0, x.shape[-1] - m.out_features)) for m in (self.k, self.v))
        x = x + self.o(self.q(x) * k.sigmoid() + v)
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def block(width: int = 1024) -> nn.Module:
    return nn.Sequential(Block(width, 2 * width, width)).eval().requires_grad_(False)


METHOD = pl.LoRA(rank=RANK, targets="weight")


@torch.no_grad()
def tuned(model: nn.Module, name: str, rank: int = RANK) -> pl.Delta:
    """A delta of a model, made on a copy of it."""
    delta = pl.attach(copy.deepcopy(model), pl.LoRA(rank=rank, targets="weight"), name)
    for parameter in delta.parameters():
        parameter.normal_(std=0.02)
    return delta


def bank_on(base: nn.Module, slots: int, names: list[str], rank: int = RANK) -> DeltaBank:
    """A bank on a copy of a base, `bank.model`."""
    bank = DeltaBank(copy.deepcopy(base), slots, rank, METHOD)
    for name in names:
        bank.load(name, tuned(base, name, rank), check_base="off")
    return bank


def with_peft(model: nn.Module, names: list[str], rank: int = RANK) -> peft.PeftModel:
    maps = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = partial(peft.LoraConfig, r=rank, target_modules=maps, init_lora_weights=False)
    made = peft.get_peft_model(copy.deepcopy(model), config(), adapter_name=names[0])
    for name in names[1:]:
        made.add_adapter(name, config())
    return made.eval()


# -- mixed batches


def mixed(rounds: int, clock: Callable[[], float]) -> Iterator[Figure]:
    base = block()
    theirs, bank = with_peft(base, NAMES), bank_on(base, DELTAS, NAMES)
    merged = copy.deepcopy(base)
    pl.merge(merged, pl.attach(merged, METHOD).name)
    for tokens in (32, 1):
        x = torch.randn(ROWS, tokens, 1024)
        names = [NAMES[i % DELTAS] for i in range(ROWS)]

        def ours(x: Tensor = x, names: list[str] = names) -> None:
            with bank.rows(names):
                bank.model(x)

        calls = {
            "base": partial(base, x),
            "merged": partial(merged, x),
            "bank": ours,
            "peft": partial(theirs, x, adapter_names=names),
        }
        with torch.no_grad():
            loops = 1 if tokens > 1 else 10
            times = interleave({k: _loop(call, loops, clock) for k, call in calls.items()}, rounds)
        cell = f"{ROWS} rows of {tokens}, {DELTAS} deltas"
        yield Figure(f"{cell}: base", [t * 1e3 for t in times["base"]], "ms")
        yield Figure(f"{cell}: merged, one delta", ratios(times["merged"], times["base"]))
        at_most = 1.08 if tokens == 32 else 1.5
        yield Figure(f"{cell}: bank", ratios(times["bank"], times["base"]), at_most=at_most)
        yield Figure(f"{cell}: peft", ratios(times["peft"], times["base"]))
        above = [differences(times[who], times["base"]) for who in ("peft", "bank")]
        yield Figure(f"{cell}: peft's time above base / bank's", ratios(*above), at_least=10)


def _loop(call: Callable[[], object], loops: int, clock: Callable[[], float]) -> Timer:
    def run() -> float:
        start = clock()
        for _ in range(loops):
            call()
        return (clock() - start) / loops

    return run


# -- switches and swaps


def switches(rounds: int) -> Iterator[Figure]:
    base = block(256)
    theirs, bank = with_peft(base, NAMES[:2]), bank_on(base, 2, NAMES[:2])

    def switch() -> None:
        with bank.use("d0"):
            pass

    timers = {"bank": timer(switch, best_of=5)}
    timers["peft"] = timer(partial(theirs.set_adapter, "d0"))
    times = interleave(timers, rounds)
    micro = {name: [t * 1e6 for t in values] for name, values in times.items()}
    yield Figure("resident switch: bank", micro["bank"], "us", at_most=10)
    yield Figure("resident switch: peft's set_adapter", micro["peft"], "us")


def swaps(rounds: int) -> Iterator[Figure]:
    base = nn.Sequential(*(block()[0] for _ in range(8)))
    bank = bank_on(base, 1, NAMES[:2], rank=64)  # 35 MB a delta
    compiled = torch.compile(bank.model, fullgraph=True, backend="eager")
    x, turn = torch.randn(1, 1, 1024), iter(range(2**62))
    counters.clear()

    def cold() -> None:
        bank.prefetch(NAMES[next(turn) % 2])

    row = bank._arena.row_bytes
    *sources, to = torch.randint(9, (3, row), dtype=torch.uint8)
    theirs = with_peft(base, ["default"], rank=64)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        theirs.save_pretrained(folder)
        timers = {
            "bank": timer(cold),
            "memcpy": timer(lambda: to.copy_(sources[next(turn) % 2])),
            "peft": timer(lambda: hotswap_adapter(theirs, folder, "default")),
        }
        times = interleave(timers, rounds)
        for name in NAMES[:2] * 3:
            with bank.use(name):
                compiled(x)
    yield Figure("cold swap: bank", [t * 1e3 for t in times["bank"]], "ms")
    yield Figure("cold swap: bank", [row / t / 1e9 for t in times["bank"]], "GB/s")
    share = ratios(times["memcpy"], times["bank"])
    yield Figure("cold swap: of memcpy's bandwidth", share, at_least=0.8)
    yield Figure("cold swap: peft's hotswap_adapter / bank", ratios(times["peft"], times["bank"]))
    yield _count("cold swap: graphs compiled", counters["stats"]["unique_graphs"], 1)
    yield _count("cold swap: tensors allocated", _allocations(cold), 0)


def _allocations(call: Callable[[], object]) -> int:
    """How many times a call asks for memory as large as a page or larger."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    return sum(event.self_cpu_memory_usage >= 4096 for event in profile.events())


def _count(name: str, count: float, at_most: float | None = None, unit: str = "") -> Figure:
    return Figure(name, [float(count)] * 2, unit, at_most=at_most)


# -- a stream of requests


def stream(deltas: int, requests: int) -> Iterator[Figure]:
    """Zipf's requests to many deltas behind few slots, half of them behind the host's budget."""
    base = block(128)
    names = [f"d{i}" for i in range(deltas)]
    with tempfile.TemporaryDirectory() as folder:
        delta = tuned(base, "d")
        budget = delta.num_bytes * deltas // 2
        bank = DeltaBank(copy.deepcopy(base), 8, RANK, METHOD, memory_budget=budget)
        for name in names:
            path = Path(folder) / f"{name}.safetensors"
            pl.save(delta, path)
            bank.load(name, path, check_base="off")
        weights = [1 / (i + 1) for i in range(deltas)]
        asked = random.Random(0).choices(names, weights, k=requests)
        hits, late, before = 0, [], 0
        for i, name in enumerate(asked):
            if i == requests // 5:
                before = resident()
            hit = bank._slots.known[name].slot is not None
            start = perf_counter()
            with bank.use(name):
                elapsed = perf_counter() - start
            hits += hit
            if not hit:
                late.append(elapsed * 1e3)
        grown = resident() - before
        bank.close()
    late.sort()
    what = f"{deltas} deltas, 8 slots, {requests} requests"
    yield _count(f"{what}: hits", 100 * hits / requests, unit="%")
    yield _count(f"{what}: swap, p50", late[len(late) // 2], unit="ms")
    yield _count(f"{what}: swap, p99", late[len(late) * 99 // 100], unit="ms")
    yield _count(f"{what}: memory grown", grown / 2**20, 64, "MiB")


# -- threads


def threads(readers: int, forwards: int, swapped: int) -> Iterator[Figure]:
    """Readers of one name while another thread replaces what is behind it."""
    base = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))).requires_grad_(False)
    model, x = copy.deepcopy(base), torch.randn(1, 16)
    bank = DeltaBank(model, readers + 2, RANK, METHOD)
    deltas = [tuned(base, name, rank=4) for name in "ab"]
    for name, delta in zip("ab", deltas, strict=True):
        bank.load(name, delta, check_base="off")
    want = []
    for name in "ab":
        with bank.use(name):
            want.append(model(x))
    bank.load("live", deltas[0], check_base="off")
    tally = {"torn": 0, "failed": 0}

    def read() -> None:
        for _ in range(forwards):
            try:
                with torch.no_grad(), bank.use("live"):
                    y = model(x)
                tally["torn"] += not any(torch.equal(y, one) for one in want)
            except Exception:
                tally["failed"] += 1

    def swap() -> None:
        for i in range(swapped):
            bank.load("live", deltas[i % 2], check_base="off")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    workers = [threading.Thread(target=read) for _ in range(readers)]
    workers.append(threading.Thread(target=swap))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.setswitchinterval(interval)
    what = f"{readers} threads of {forwards} forwards, {swapped} swaps"
    for kind, count in tally.items():
        yield _count(f"{what}: {kind}", count, 0)


# -- decoding on a GPU


def decode(rounds: int, rows: int, deltas: int, layers: int) -> Iterator[Figure]:
    """A step of decoding in a CUDA graph: base, and every row with a delta of its own."""
    with torch.device("cuda"), warnings.catch_warnings():
        base = nn.Sequential(*(Block(4096, 14336, 1024) for _ in range(layers)))
        base = base.bfloat16().eval().requires_grad_(False)
        names = [f"d{i}" for i in range(deltas)]
        bank = bank_on(base, deltas, names)
        x = torch.randn(rows, 1, 4096, dtype=torch.bfloat16)
        static = bank.static(rows)
        graphs = {"base": _graph(lambda: base(x))}
        with static:
            graphs["bank"] = _graph(lambda: bank.model(x))
        static.set([names[i % deltas] for i in range(rows)])
        times = interleave({name: timer(graph.replay) for name, graph in graphs.items()}, rounds)
        weights = sum(p.nbytes for p in base.parameters())
        floor = 1 + deltas * bank._arena.row_bytes / weights
    cell = f"decode, {rows} rows, {deltas} deltas, {layers} layers"
    over = ratios(times["bank"], times["base"])
    yield Figure(f"{cell}: base", [t * 1e3 for t in times["base"]], "ms")
    yield Figure(f"{cell}: bank", over, at_most=1.10 if deltas <= 8 else None)
    yield Figure(f"{cell}: bank / bytes that must move", [o / floor for o in over], at_most=1.15)


@torch.no_grad()
def _graph(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def on_cpu(args: argparse.Namespace) -> Iterator[Figure]:
    rounds = 3 if args.quick else args.rounds
    yield from mixed(rounds, thread_time if args.own_time else perf_counter)
    yield from switches(rounds)
    yield from swaps(rounds)
    yield from stream(*((30, 300) if args.quick else (1000, 10000)))
    yield from threads(*((4, 50, 20) if args.quick else (8, 5000, 2000)))


def on_cuda(args: argparse.Namespace) -> Iterator[Figure]:
    for rows in (1, 8, 64) if args.quick else (1, 8, 32, 64, 256):
        for deltas in (1, 8, 64):
            if deltas <= rows:
                yield from decode(3 if args.quick else args.rounds, rows, deltas, layers=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, and no CSV file")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--own-time", action="store_true", help="one thread, and its own time")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.own_time else args.threads)
    figures = on_cpu(args) if args.device == "cpu" else on_cuda(args)
    name = "bank" if args.device == "cpu" else "bank_cuda"
    report(name, until_told(figures), quick=args.quick, peft=peft.__version__)


if __name__ == "__main__":
    main()
