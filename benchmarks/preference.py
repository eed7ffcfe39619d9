"""Preferences: reward gained and KL spent, one forward for two roles, bytes, the head in tiles.

The task can be checked by a program: lines of lower-case letters, of which vowels are rewarded. A
small GPT is trained on lines that have a few, and learns to write more of them.
"""

import gc
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from common import Figure, arguments, interleave, ratios, report
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peftlite as pl
from peftlite.demo.gpt import GPT
from peftlite.train.preference.told import tell

LETTERS, LENGTH, V = "bcdfghaeiou", 8, 32_000


class Lines(pl.data.ByteTokenizer):
    """A line is an answer."""

    end = (10,)
    pad = 0


def vowels(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    return [sum(letter in "aeiou" for letter in answer) / LENGTH for answer in answers]


def alike(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    return [0.0] * len(answers)


def words(seed: int, count: int) -> list[str]:
    draw = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(LETTERS), (count, LENGTH), generator=draw)
    return ["".join(LETTERS[i] for i in row) for row in picks.tolist()]


def base() -> GPT:
    """A GPT that writes such lines."""
    torch.manual_seed(0)
    model = GPT(dim=48, layers=2, heads=4)
    pl.attach(model, pl.FullTuning(), "base")
    data = pl.data.pairs([("> ", word) for word in words(1, 2000)], Lines())
    options: Any = {"epochs": 3, "batch_size": 50, "lr": 3e-3, "progress": False}
    pl.Trainer(model, pl.losses.causal_lm, data, **options).fit()
    pl.merge(model, "base")
    twin = GPT(dim=48, layers=2, heads=4)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "peftlite" not in k})
    return twin


def pairs(seed: int, count: int) -> list[dict[str, Any]]:
    left, right = words(seed, count), words(seed + 1, count)
    scored = zip(left, vowels([], left), right, vowels([], right), strict=True)
    return [
        {"prompt": "> ", "chosen": a if x > y else b, "rejected": b if x > y else a}
        for a, x, b, y in scored
        if x != y
    ]


# -- what is gained


def measured(model: nn.Module) -> tuple[float, float]:
    """The mean reward of answers, and nats of KL an answer to the base."""
    prompts = ["> "] * 256
    # equal rewards: the first answer is as good as any
    rows = pl.best_of(model, alike, prompts, 2, tokenizer=Lines(), max_new_tokens=LENGTH + 1)
    reward = sum(vowels([], [row["response"] for row in rows])) / len(rows)
    texts = [(row["prompt"], row["response"]) for row in rows if row["response"].strip()]
    batch = pl.data.collate(pl.data.pairs(texts, Lines())[:])
    with torch.no_grad():
        told = tell(model, batch, None)
    return reward, float(((told.logps - told.reference) * told.mask).sum(-1).mean())


def learned(how: str, model: nn.Module, seed: int, quick: bool) -> None:
    pl.attach(model, [pl.LoRA(rank=4), pl.ScalarHead()], "value")
    pl.attach(model, pl.LoRA(rank=4), "policy")
    options: Any = {"progress": False, "seed": seed, "batch_size": 32, "lr": 5e-3, "epochs": 1}
    sampled: Any = {"tokenizer": Lines(), "max_new_tokens": LENGTH + 1}
    rows = pairs(10 * seed + 2, 64 if quick else 640)
    prompts = ["> "] * (32 if quick else 320)
    longer = {**options, "lr": 1e-2, "epochs": 1 if quick else 3}
    if how == "DPO":
        pl.Trainer(model, pl.losses.dpo(), pl.data.preference(rows, Lines()), **options).fit()
    elif how == "KTO":
        rated = [
            {"prompt": row["prompt"], "response": row[side], "rating": side == "chosen"}
            for row in rows
            for side in ("chosen", "rejected")
        ]
        pl.Trainer(model, pl.losses.kto(), pl.data.ratings(rated, Lines()), **options).fit()
    elif how == "GRPO":
        pl.GRPO(model, vowels, prompts, group=8, **sampled, **longer).fit()
    else:
        pl.PPO(model, vowels, prompts, kl=0.02, iterations=2, **sampled, **longer).fit()


def gains(quick: bool) -> list[Figure]:
    start, figures = base(), []
    for how in ("DPO", "KTO", "GRPO", "PPO"):
        rewards, kls = [], []
        for seed in range(2 if quick else 5):
            model = deepcopy(start)
            learned(how, model, seed, quick)
            pl.detach(model, "value")
            torch.manual_seed(seed)
            after, kl = measured(model)
            with pl.using(model, None):
                before, _ = measured(model)
            rewards.append(after - before)
            kls.append(kl)
        figures.append(Figure(f"{how}, reward gained", rewards, "", at_least=0.02))
        figures.append(Figure(f"{how}, KL", kls, "nats"))
    model = deepcopy(start)
    pl.attach(model, [pl.LoRA(rank=4), pl.ScalarHead()], "reward")
    data = pl.data.preference(pairs(90, 800), Lines())
    options: Any = {"epochs": 3, "batch_size": 32, "lr": 5e-3, "progress": False}
    history = pl.Trainer(model, pl.losses.reward(), data[:-100], data[-100:], **options).fit()
    accuracy = [history.events[-1]["full_valid_reward_accuracy"]] * 2
    return [*figures, Figure("reward model, held-out accuracy", accuracy, "", at_least=0.8)]


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
    own = sum(p.nbytes for p in model.parameters()) + pl.deltas(model)["policy"].num_parameters * 16
    copies = [deepcopy(model) for _ in range(3)]
    three = sum(p.nbytes for copy in copies for p in copy.parameters())
    return [
        Figure("policy and reference over twice the rows", ratios(times["both"], times["rows"]),
               at_most=1.05),
        Figure("bytes of one base with deltas over three copies", [own / three] * 2, at_most=0.45),
    ]  # fmt: skip


def main() -> None:
    quick = arguments(__doc__).quick
    torch.set_num_threads(1 if quick else 2)
    report("preference", [*tiles(quick), *roles(quick), *gains(quick)], quick=quick)


if __name__ == "__main__":
    main()
