"""Many fine-tunes at once on one base: against one after another, and peft's set_adapter loop.

Steps of LoRA r=8 by AdamW on a small GPT-2, whole trainers, a search over 16 rates on T4 and on
OCR, and the memory of 32 jobs. `--own-time` counts this process's own time, for a machine that
others use.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from time import perf_counter, process_time
from typing import Any

import peft
import torch
import torch.nn.functional as F
from common import Figure, Timer, interleave, ratios, report
from comparison.bytelm import ByteLM
from comparison.ocr import OCR
from held import forget, most
from quality import CACHE
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel

import peftlite as pl
from peftlite.train.schedule import adamw

RANK, RATE, WORDS = 8, 1e-3, 512
CELLS = ((32, 1, 32), (8, 1, 32), (8, 2, 64), (8, 4, 128), (32, 1, 128), (2, 8, 128))
SIZES = {"small": (256, 4), "tiny": (32, 1)}  # width, blocks
RATES = [1e-4 * 10 ** (i / 4) for i in range(16)]
METHOD = pl.LoRA(rank=RANK, targets=["c_attn", "c_proj", "c_fc"])


def gpt(size: str = "small") -> GPT2LMHeadModel:
    torch.manual_seed(0)
    width, blocks = SIZES[size]
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(n_embd=width, n_layer=blocks, n_head=4, vocab_size=WORDS, n_positions=128)
    config.update({**still, "use_cache": False})
    return GPT2LMHeadModel(config).requires_grad_(False)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def ours(parameters: Any) -> torch.optim.Optimizer:
    """As pl.Trainer has it."""
    return adamw([{"params": [*parameters], "lr": RATE}])


# -- a step of all


def together(ids: Tensor, count: int, size: str) -> Callable[[], None]:
    model, names = gpt(size), [f"d{i}" for i in range(count)]
    bank = pl.DeltaBank(model, count, RANK, METHOD)
    for name in names:
        bank.load(name, METHOD)
    optimizers = [ours(bank.parameters(name)) for name in names]
    rows = [name for name in names for _ in range(len(ids) // count)]

    def step() -> None:
        with bank.train(rows):
            (loss_of(model, ids) * count).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def one_by_one(ids: Tensor, count: int, size: str) -> Callable[[], None]:
    model = gpt(size)
    deltas = [pl.attach(model, METHOD, name=f"d{i}") for i in range(count)]
    return _loop(ids, model, [ours(d.parameters()) for d in deltas],
                 lambda i: pl.use(model, f"d{i}"))  # fmt: skip


def with_peft(ids: Tensor, count: int, size: str) -> Callable[[], None]:
    config = peft.LoraConfig(r=RANK, target_modules=METHOD.targets, fan_in_fan_out=True)
    model = peft.get_peft_model(gpt(size), config, adapter_name="d0")
    for i in range(1, count):
        model.add_adapter(f"d{i}", config)
    theirs = partial(torch.optim.AdamW, lr=RATE, fused=True)
    own = [[p for n, p in model.named_parameters() if f".d{i}." in n] for i in range(count)]
    return _loop(ids, model, [theirs(parameters) for parameters in own],
                 lambda i: model.set_adapter(f"d{i}"))  # fmt: skip


def _loop(
    ids: Tensor, model: nn.Module, optimizers: list[Any], choose: Callable[[int], None]
) -> Callable[[], None]:
    parts = ids.chunk(len(optimizers))

    def step() -> None:
        for i, (part, optimizer) in enumerate(zip(parts, optimizers, strict=True)):
            choose(i)
            loss_of(model, part).backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def steps(rounds: int, timed: Callable[[Callable[[], None]], Timer]) -> Iterator[Figure]:
    for size, cells in (("small", CELLS), ("tiny", CELLS[:2])):
        for count, rows, tokens in cells:
            ids = torch.randint(WORDS, (count * rows, tokens))
            makers = {"together": together, "one by one": one_by_one, "peft": with_peft}
            calls = {name: make(ids, count, size) for name, make in makers.items()}
            times = interleave({name: timed(call) for name, call in calls.items()}, rounds)
            cell = f"{size} GPT, {count} deltas of {rows} rows of {tokens}"
            yield Figure(f"{cell}: together", [t * 1e3 for t in times["together"]], "ms")
            least = {(32, 1, 32): 2.5, (8, 2, 64): 1.7}.get((count, rows, tokens), 1.0)
            faster = ratios(times["one by one"], times["together"])
            yield Figure(f"{cell}: one by one / together", faster, at_least=least)
            faster = ratios(times["peft"], times["together"])
            least = 4.0 if (count, rows, tokens) == (32, 1, 32) else None
            yield Figure(f"{cell}: peft / together", faster, at_least=least)


# -- whole trainers


def texts(seed: int, count: int, tokens: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (count, tokens), generator=draw)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainers(rounds: int, clock: Callable[[], float], size: str, length: int) -> Iterator[Figure]:
    count, tokens = 16, 32

    def made(model: nn.Module) -> list[pl.Trainer]:
        found = []
        for i in range(count):
            pl.attach(model, METHOD, name=f"d{i}")
            given = {"epochs": 1, "batch_size": 1, "lr": RATE, "progress": False}
            data = texts(i, length, tokens)
            found.append(pl.Trainer(model, pl.losses.causal_lm, data, delta=f"d{i}", **given))
        return found

    def at_once() -> float:
        jobs = made(gpt(size))
        began = clock()
        pl.fit_together(jobs, progress=False)
        return clock() - began

    def alone() -> float:
        jobs = made(gpt(size))
        began = clock()
        for job in jobs:
            pl.use(job.model, job.delta)
            job.fit()
        return clock() - began

    times = interleave({"at once": at_once, "alone": alone}, rounds)
    name = (
        f"{size} GPT, {count} trainers of {length} steps of 1 row of {tokens}: fit / fit_together"
    )
    yield Figure(name, ratios(times["alone"], times["at once"]), at_least=1.0)


# -- a search


# 39 of the tasks' 40 steps, so that a search has something to halve by
EPOCHS, PER_EPOCH = 13, 3


class Stream(IterableDataset[Any]):
    """Examples in an order of their own, the same for every trial."""

    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.examples)


def t4(quick: bool) -> dict[str, Any]:
    task, draw = ByteLM(CACHE, quick), torch.Generator().manual_seed(0)
    rows = torch.cat([task.sample(draw) for _ in range(EPOCHS * PER_EPOCH)]).long()
    held = task.held["validation"][: 32 * 129].view(32, 129).long()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["ids"][:, :-1]).mT, batch["ids"][:, 1:])

    train, val = ([{"ids": row} for row in some] for some in (rows, held))
    return {"model": task.base, "loss": loss, "train": Stream(train), "val": val, "batch_size": 4}


def ocr(quick: bool) -> dict[str, Any]:
    task, draw = OCR(CACHE, quick), torch.Generator().manual_seed(0)
    order = [i for _ in range(4) for i in torch.randperm(len(task.train), generator=draw)]
    return {
        "model": task.base,
        "loss": task.ocr.loss,
        "train": Stream([task.train[i] for i in order]),
        "val": task.held["validation"][:20],
        "batch_size": task.batch,
        "collate": task.ocr.collate,
    }


SEARCHES = {"T4": t4, "OCR": ocr}


def search(name: str, clock: Callable[[], float], quick: bool) -> Iterator[Figure]:
    """16 rates on a task: one search that halves, and 16 trainings."""
    given = SEARCHES[name](quick)
    epochs = 4 if quick else EPOCHS
    given |= {"epochs": epochs, "examples": PER_EPOCH * given["batch_size"], "progress": False}

    def build(choice: dict[str, Any]) -> pl.Trainer:
        pl.attach(given["model"], pl.LoRA(rank=RANK), name="trial")
        return pl.Trainer(**given, lr=choice["lr"])

    found, seconds = {}, {}
    for k in (16, 1):
        began = clock()
        how = {"how": "grid", "prune": k > 1, "together": k, "progress": False}
        found[k] = pl.search(build, {"lr": RATES}, **how)
        seconds[k] = clock() - began
    same = found[16].best.choice == found[1].best.choice
    faster = [seconds[1] / seconds[16]] * 2
    yield Figure(f"{name}, 16 rates: 16 trainings / one search", faster, at_least=4)
    yield Figure(f"{name}, 16 rates: the same winner", [float(same)] * 2, "", at_least=1)
    best = [found[k].best.value or 0.0 for k in (16, 1)]
    name = f"{name}, 16 rates: least loss, the search's / that of 16 trainings"
    yield Figure(name, [best[0] / best[1]] * 2)


# -- memory


def memory() -> Iterator[Figure]:
    """What 32 jobs hold beyond one, over their deltas and optimizers, each in its own process."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        one, many, delta = (
            pool.submit(peak, count, rows).result() for count, rows in ((1, 32), (32, 1), (0, 0))
        )
    yield Figure("32 jobs of 1 row beyond 1 of 32 rows, over 32 deltas with AdamW's two moments",
                 [(many - one) / (32 * 3 * delta)] * 2, at_most=1.5)  # fmt: skip


def peak(count: int, rows: int) -> int:
    """The most bytes that a process held in two steps; those of a delta for no jobs."""
    torch.set_num_threads(1)
    if not count:
        return pl.attach(gpt(), METHOD, name="d").num_bytes
    step = together(torch.randint(WORDS, (count * rows, 32)), count, "small")
    forget()
    for _ in range(2):
        step()
    return most()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, and no CSV file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--own-time", action="store_true", help="of this process, not the wall's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rounds, clock = (
        2 if args.quick else args.rounds,
        process_time if args.own_time else perf_counter,
    )

    def timed(call: Callable[[], None]) -> Timer:
        def run() -> float:
            began = clock()
            call()
            return clock() - began

        return run

    figures = [*steps(rounds, timed)]
    few = min(rounds, 2)
    for size, length in (("small", 4 if args.quick else 24), ("tiny", 4 if args.quick else 24)):
        figures += trainers(few, clock, size, length)
    for name in SEARCHES:
        figures += search(name, clock, args.quick)
    figures += memory()
    report("together", figures, quick=args.quick, peft=peft.__version__)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)
    main()
