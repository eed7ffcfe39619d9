"""What each of two processes does, started by torchrun.

`together.py FOLDER` leaves there what came of it all, a file for each process. It begins with what
has one process killed, for torchrun to start them both again.
"""

import contextlib
import io
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.cli import main as command_line
from peftlite.demo.gpt import GPT
from peftlite.train import losses
from tests.train.tiny import LORA, gpt, texts, timeless, trainer, values

DRY = pl.LoRA(rank=2, targets=["q_proj", "v_proj"])
EVEN = {"train": texts(11), "val": texts(5, seed=1), "batch_size": 5, "valid_every": 2}
"""Of 5, 5 and 1 examples: the last leaves nothing for the second process."""

TRAIN = [
    "train", "--model", "model", "--data", "chats.jsonl", "--max-length", "64", "--epochs", "1",
    "--batch-size", "8", "--set", "dropout=0", "--json", "--out",
]  # fmt: skip

NEVER = ("forked", "fsdp")
"""FSDP gathers a block's weights for all processes at once: all have to go one way."""

Scenario = Callable[[int, Path], Any]


def adalora() -> pl.Method:
    return pl.AdaLoRA(init_rank=3, target_rank=1, total_steps=9, t_init=1, t_final=2)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 128}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).double()
    pl.attach(model, pl.LoRA(rank=2), "sql")
    return model


class Forked(nn.Module):
    """Takes one way or the other, as the batch has it: half the parameters are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.ways[int(x[0, 0] > 0)](x)


def forked() -> nn.Module:
    torch.manual_seed(0)
    model = Forked().double()
    pl.attach(model, pl.LoRA(rank=2, targets=["ways.*"]), "sql")
    return model


def forks(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Examples that take turns, in twos that go one way."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(count, 4, generator=draw, dtype=torch.float64)
    rows[:, 0] = torch.tensor([1.0 if i // 2 % 2 else -1.0 for i in range(count)])
    return [(row, row[:2]) for row in rows]


def squares(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


EQUAL: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "uneven": (lambda: gpt(DRY, torch.float64), EVEN),
    "accumulate": (lambda: gpt(DRY, torch.float64), {**EVEN, "accumulate": 2}),
    "adalora": (lambda: gpt(adalora(), torch.float64), EVEN),
    "checkpointing": (lambda: gpt(DRY, torch.float64), {**EVEN, "gradient_checkpointing": True}),
    "llama": (llama, EVEN),
    "forked": (forked, {"train": forks(), "val": forks(4), "loss": squares, "shuffle": False}),
}
"""What comes to the same in one process and in two."""

CASES = [(name, kind) for name in EQUAL for kind in ("ddp", "fsdp") if (name, kind) != NEVER]


def fitted(model: nn.Module, folder: Path, **options: Any) -> dict[str, Any]:
    history = trainer(model, folder, **options).fit()
    return {"values": values(model), "events": timeless(history), "best": history.best}


def equal(rank: int, folder: Path, name: str, parallel: Any) -> Any:
    make, options = EQUAL[name]
    found = fitted(model := make(), folder, parallel=parallel, **options)
    spread = [n for n, p in model.named_parameters() if hasattr(p, "placements")]
    pl.save(pl.deltas(model)["sql"], folder / f"saved-{rank}.safetensors")
    return {**found, "spread": spread}


def resumed(rank: int, folder: Path, parallel: Any) -> Any:
    """Stopped by the first process, within an epoch, and gone on with; beside one that wasn't."""

    class Stop:
        def start(self, trainer: Any, history: Any) -> None:
            self.trainer = trainer

        def event(self, event: Any) -> None:
            if event["step"] == 4:
                self.trainer.stop()

        def end(self, history: Any) -> None: ...

    options = {**EVEN, "parallel": parallel, "save_every": 2}
    whole = fitted(gpt(LORA), folder / "whole", **options)
    first = trainer(gpt(LORA), folder / "again", **options, callbacks=[Stop()]).fit()
    again = trainer(model := gpt(LORA), folder / "again", **options)
    history = again.fit(resume=True)
    return {
        "stopped": first.stopped, "whole": whole,
        "values": values(model), "events": timeless(history),
    }  # fmt: skip


def restarted(rank: int, folder: Path) -> Any:
    """As `resumed` has it whole; but the second process is killed, once."""
    calls = 0

    def loss(model: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 9 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return losses.causal_lm(model, batch)

    run = trainer(model := gpt(LORA), folder / "run", loss=loss, save_every=2, **EVEN)
    events = timeless(run.fit(resume=True))
    restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
    return {"events": events, "values": values(model), "restarts": restarts}


def command(rank: int, folder: Path, parallel: str) -> Any:
    """What is printed; the model and the data lie beside the folder."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        options = [*TRAIN, folder.name, "--parallel", parallel, "--name", "one"]
        return command_line(options), printed.getvalue()


def unseeded(rank: int, folder: Path) -> Any:
    """Deltas that begin differently."""
    base = gpt(DRY)
    pl.detach(base, "sql")
    torch.manual_seed(rank)
    pl.attach(base, DRY, "sql")
    return fitted(base, folder)


def probed(rank: int, folder: Path) -> Any:
    """How often each process is asked and told; each has a score of its own."""
    asked, told = [], []

    class Tell:
        def start(self, *_: Any) -> None: ...
        def event(self, event: Any) -> None:
            told.append(event["step"])

        def end(self, _: Any) -> None: ...

    def probe(model: nn.Module) -> float:
        asked.append(random.random())
        return float(rank * len(asked))

    given = {"probes": {"old": probe}, "metric": "old", "patience": 1}
    history = trainer(folder=folder, callbacks=[Tell()], **given).fit()
    return {"asked": len(asked), "told": told, "stopped": history.stopped}


def scaled(rank: int, folder: Path) -> Any:
    return fitted(gpt(LORA), folder, autocast="fp16", accumulate=2)


def again(rank: int, folder: Path) -> Any:
    """A model that was spread over the processes trains on, and chooses its base."""
    model = gpt(DRY, torch.float64)
    trainer(model, parallel="fsdp").fit()
    ids = torch.arange(32, 48)[None]
    with torch.no_grad(), pl.using(model, None):
        off = model(ids)
    fitted(model, folder, parallel="fsdp")
    with torch.no_grad():
        on = model(ids)
        pl.merge(model, "sql")
        merged = model(ids)
        pl.unmerge(model, "sql")
        pl.detach(model, "sql")
        torch.manual_seed(0)
        base = GPT(16, 2, 2).double()(ids)
        return {"on": on, "merged": merged, "off": off, "detached": model(ids), "base": base}


SEVERAL: dict[str, dict[str, Any]] = {
    "sql": {**EVEN},
    "chat": {**EVEN, "epochs": 3, "accumulate": 2, "lr": 3e-3},
    "code": {**EVEN, "train": texts(11, seed=2), "patience": 1},
}


def several(rank: int, folder: Path, parallel: Any) -> Any:
    """Deltas that train on one base at once, of which one fails, by the share of one process."""

    def loss(model: nn.Module, batch: Any) -> Any:
        said = losses.causal_lm(model, batch)
        return {**said, "loss": said["loss"] / (0 if (batch["input_ids"] == 7).any() else 1)}

    model = gpt(DRY, torch.float64)
    for name in ("chat", "code", "bad"):
        torch.manual_seed(len(name))
        pl.attach(model, DRY, name)
    bad = texts(12)
    bad[7]["input_ids"][0] = 7
    each = {**SEVERAL, "bad": {"train": bad, "shuffle": False, "loss": loss, "batch_size": 4}}
    trainers = [
        trainer(model, folder and folder / name, delta=name, parallel=parallel, **options)
        for name, options in each.items()
    ]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        histories = pl.fit_together(trainers, progress=False)
    saved = {name: pl.deltas(model)[name].saved() for name in each}
    found = {f"{name} {key}": t for name, own in saved.items() for key, t in own.items()}
    told = [str(each.message) for each in warned if "failed" in str(each.message)]
    return {"values": found, "events": [timeless(h) for h in histories], "told": told}


def searched(rank: int, folder: Path) -> Any:
    """Trials that follow from one another, and a search that goes on."""
    folder.mkdir(exist_ok=True)
    model = gpt(DRY, torch.float64)

    def build(choice: Any) -> Any:
        pl.attach(model, DRY, "trial")
        return trainer(model, lr=choice["lr"], delta="trial")

    given = {"space": {"lr": (1e-3, 1e-1, "log")}, "file": folder / "trials", "progress": False}
    pl.search(build, trials=2, **given)
    return list(pl.search(build, trials=3, **given).rows())


# -- what is refused, in both


def other_base(rank: int, folder: Path) -> Any:
    model = gpt()
    with torch.no_grad():
        model.lm_head.weight[0, rank] += 1
    trainer(model, folder).fit()


def other_settings(rank: int, folder: Path) -> Any:
    trainer(folder=folder, lr=1e-3 * (1 + rank)).fit()


def other_fields(rank: int, folder: Path) -> Any:
    def loss(model: nn.Module, batch: Any) -> Any:
        return losses.causal_lm(model, batch) | dict.fromkeys(["extra"] * rank, 1.0)

    trainer(folder=folder, loss=loss, val=None).fit()


def own_shards(rank: int, folder: Path) -> Any:
    from torch.distributed.fsdp import fully_shard

    run = trainer(fully_shard(gpt()), folder)
    for _ in range(20):  # whoever leaves first cuts the other off from nothing
        with contextlib.suppress(pl.PeftliteError):
            run.fit()
    run.fit()


def no_folder(rank: int, folder: Path) -> Any:
    folder.parent.mkdir(exist_ok=True, parents=True)
    folder.write_text("a file")
    trainer(folder=folder).fit()


def not_finite(rank: int, folder: Path) -> Any:
    """A loss that isn't finite in the share of one process."""

    def loss(model: nn.Module, batch: Any) -> Any:
        said = losses.causal_lm(model, batch)
        marked = (batch["input_ids"] == 7).any()
        return {**said, "loss": said["loss"] / 0 if marked else said["loss"]}

    data = texts(12)
    data[7]["input_ids"][0] = 7  # the last of the second step: of the second process
    model = gpt(DRY)
    given = {"train": data, "shuffle": False, "epochs": 1}
    try:
        trainer(model, folder, **given, loss=loss).fit()
    except pl.PeftliteError as error:
        told = str(error)
    return {"told": told, "values": values(model)}


ALL: dict[str, Scenario] = {
    "restarted": restarted,
    **{f"{name}-{kind}": partial(equal, name=name, parallel=kind) for name, kind in CASES},
    **{f"resumed-{kind}": partial(resumed, parallel=kind) for kind in ("ddp", "fsdp")},
    **{f"several-{kind}": partial(several, parallel=kind) for kind in ("ddp", "fsdp")},
    **{f"command-{kind}": partial(command, parallel=kind) for kind in ("ddp", "fsdp")},
    **{
        each.__name__: each
        for each in (
            unseeded, probed, scaled, again, searched, other_base, other_settings, other_fields,
            own_shards, no_folder, not_finite,
        )
    },
}  # fmt: skip


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for name, scenario in ALL.items():
        try:
            found = scenario(rank, folder / name)
        except pl.PeftliteError as error:
            found = f"{type(error).__name__}: {error}"
        torch.save(found, folder / f"{name}.{rank}")


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    main(Path(sys.argv[1]))
