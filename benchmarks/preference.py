"""Preferences: reward gained and KL spent, what is forgotten; what roles on one base cost.

What is learned is in `vowels.py`: a small GPT writes lines, of which vowels are rewarded. The rate
of every way to learn is chosen on prompts of their own, five seeds are seen on prompts held out.
"""

import gc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from common import Figure, arguments, differences, interleave, ratios, report
from held import forget, most, resident
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vowels import CODE, POLICIES, Policy, Seen, base, pairs, prompts, seen

import peftlite as pl
from peftlite.demo.gpt import GPT
from peftlite.train.preference.told import last_scalars, tell

V = 32_000


# -- what is gained


def gains(quick: bool) -> list[Figure]:
    start = base(quick)
    before = [_before(start, seed) for seed in range(2 if quick else 5)]
    figures = [Figure("base, reward", [one.reward for one in before], "")]
    for name, policy in POLICIES.items():
        figures += _gained(name, policy, start, before, quick)
    return [*figures, _reward_model(start, quick)]


def _before(start: GPT, seed: int) -> Seen:
    pl.attach(model := deepcopy(start), pl.LoRA(rank=4), "fresh")
    return seen(model, prompts()[2], seed)


def _gained(
    name: str, policy: Policy, start: GPT, before: Sequence[Seen], quick: bool
) -> list[Figure]:
    """What five seeds of a policy gain on prompts held out, and what that costs."""
    lr = policy.best_rate(start, quick)
    after = [
        seen(policy.learn(start, lr, seed, quick), prompts()[2], seed)
        for seed in range(len(before))
    ]
    rewards, bits = ([getattr(s, k) for s in after] for k in ("reward", "bits"))
    gained = differences(rewards, [s.reward for s in before])
    forgotten = differences(bits, [s.bits for s in before])
    print(f"{name}, rate {lr:g}: reward gained {min(gained):.3f} to {max(gained):.3f}", flush=True)
    return [
        Figure(f"{name}, reward gained", gained, "", at_least=0.1),
        Figure(f"{name}, KL of an answer to the base", [s.kl for s in after], "nats"),
        Figure(f"{name}, pairs held out told apart", [s.accuracy for s in after], ""),
        Figure(f"{name}, forgotten of a digit", forgotten, "bits"),
    ]


def _reward_model(start: GPT, quick: bool) -> Figure:
    """Of which pairs held out a delta with a head says rightly what was chosen."""
    right = []
    for seed in range(2 if quick else 5):
        model = deepcopy(start)
        torch.manual_seed(seed)
        pl.attach(model, [pl.LoRA(rank=4), pl.ScalarHead()], "reward")
        data, held = (
            pl.data.preference(pairs(asked, seed + 10), CODE)
            for asked in (prompts()[0], prompts()[2])
        )
        options: Any = {"epochs": 3, "batch_size": 32, "lr": 5e-3, "progress": False}
        history = pl.Trainer(model, pl.losses.reward(), data, held, **options).fit()
        right.append(history.events[-1]["full_valid_reward_accuracy"])
    return Figure("reward model, pairs held out told apart", right, "", at_least=0.8)


# -- what it costs


class Peak(TorchDispatchMode):
    """The most bytes of tensors alive at once, beyond those before."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        given = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(given):
            if (
                isinstance(x, Tensor)
                and (key := x.untyped_storage()._cdata) not in known | self.seen
            ):
                size = x.untyped_storage().nbytes()
                self.seen.add(key)
                self.alive += size
                self.most = max(self.most, self.alive)
                weakref.finalize(x.untyped_storage(), self._gone, key, size)
        return given

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.alive -= size


def peak(call: Callable[[], object]) -> int:
    gc.collect()
    with Peak() as seen:
        call()
    return seen.most


def tiles(quick: bool) -> list[Figure]:
    n, i = (256, 64) if quick else (2048, 512)
    head = nn.Linear(i, V, bias=False).requires_grad_(False)
    h, labels = torch.randn(n, i, requires_grad=True), torch.randint(V, (n,))

    def full() -> None:
        F.cross_entropy(head(h), labels).backward()

    def tiled() -> None:
        (-pl.kernels.log_probs(h, head, labels)[0].mean()).backward()

    times = interleave({"full": cpu(full), "tiled": cpu(tiled)}, 3 if quick else 9)
    return [
        Figure("head in tiles, time over all logits", ratios(times["tiled"], times["full"]),
               at_most=1.05),
        Figure("head in tiles, peak over all logits", [peak(tiled) / (n * V * 4)] * 2,
               at_most=0.25),
    ]  # fmt: skip


def cpu(call: Callable[[], object]) -> Callable[[], float]:
    """Seconds of this thread's own."""

    def once() -> float:
        start = time.thread_time()
        call()
        return time.thread_time() - start

    return once


def roles(quick: bool) -> list[Figure]:
    torch.manual_seed(0)
    model = GPT(dim=128 if quick else 384, layers=4, heads=4)
    pl.attach(model, pl.LoRA(rank=8), "policy")
    ids = torch.randint(256, (4, 128))
    batch = {"input_ids": ids, "labels": ids}
    twice = {name: torch.cat([x, x]) for name, x in batch.items()}

    def both() -> None:
        tell(model, batch, None)

    def rows() -> None:
        tell(model, twice)

    both()
    times = interleave({"both": cpu(both), "rows": cpu(rows)}, 3 if quick else 15)
    return [
        Figure("policy and reference over twice the rows", ratios(times["both"], times["rows"]),
               at_most=1.05),
    ]  # fmt: skip


# -- three roles: on one base, or a copy each


def _one_base(model: nn.Module) -> list[nn.Module]:
    pl.attach(model, [pl.LoRA(rank=8), pl.ScalarHead()], "reward")
    pl.attach(model, pl.LoRA(rank=8), "policy")
    return [model] * 3


def _three_copies(model: nn.Module) -> list[nn.Module]:
    policy, reference, rewards = model, deepcopy(model), deepcopy(model)
    pl.attach(rewards, [pl.LoRA(rank=8), pl.ScalarHead()], "reward")
    pl.attach(policy, pl.LoRA(rank=8), "policy")
    return [policy, reference, rewards]


CONTENDERS = {"one base": _one_base, "three copies": _three_copies}


def _steps(name: str, dim: int, layers: int) -> None:
    """Steps of DPO with AdamW, whose answers a reward model scores, too."""
    torch.manual_seed(0)
    policy, reference, rewards = CONTENDERS[name](GPT(dim, layers, heads=4))
    ids = torch.randint(256, (2, 16))
    batch = {"input_ids": ids, "labels": ids}
    parameters = [*pl.deltas(policy)["policy"].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for _ in range(2):
        if reference is not policy:
            with torch.no_grad():
                logps = reference(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            batch["reference"] = F.pad(logps, (1, 0))
        with pl.using(rewards, "reward"), torch.no_grad():
            last_scalars(rewards, batch)
        pl.losses.dpo()(policy, batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def _held(name: str, dim: int, layers: int) -> int:
    """The most memory that a process holds beyond what it held for a small model."""
    torch.set_num_threads(1)
    _steps(name, 64, 2)
    before = resident()
    forget()
    _steps(name, dim, layers)
    return most() - before


def copies(quick: bool) -> list[Figure]:
    """Measured, each in a process of its own."""
    shape, found = (64, 2) if quick else (768, 12), {}
    for name in CONTENDERS:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found[name] = max(1, pool.submit(_held, name, *shape).result())
    share = found["one base"] / found["three copies"]
    return [Figure("peak memory, one base over three copies", [share] * 2, at_most=0.45)]


def main() -> None:
    quick = arguments(__doc__).quick
    torch.set_num_threads(1)
    figures = copies(quick)  # first, since a process begins with the peak of its parent
    figures += [*tiles(quick), *roles(quick), *gains(quick)]
    report("preference", figures, quick=quick)


if __name__ == "__main__":
    main()
