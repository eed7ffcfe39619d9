"""train: a delta of a local model, trained on a file."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftlite.commands import local
from peftlite.commands.config import key_and_value
from peftlite.commands.data import as_share
from peftlite.commands.outcome import INTERRUPTED, Outcome
from peftlite.core.attach import attach
from peftlite.core.patch import Method
from peftlite.errors import FileError, PeftliteError
from peftlite.io.files import replacing
from peftlite.table import listed, size
from peftlite.train import History, Trainer, data, losses
from peftlite.train.checkpoints import Checkpoints
from peftlite.train.data.readers import PIECE, has_rows, plain_text, reader_for
from peftlite.train.events import Progress
from peftlite.train.parallel import is_first, local_device, will_shard
from peftlite.train.state import fork_rng
from peftlite.verbs.plan import plan

LOSSES = {"preference": losses.dpo(), "ratings": losses.kto()}  # by what reads the data
NEEDED = ("model", "data", "out")
SETTINGS = (
    "epochs", "batch_size", "accumulate", "lr", "lr_multiplier", "b_ratio", "schedule", "warmup",
    "weight_decay", "clip", "metric", "patience", "valid_every", "save_every", "check_every",
    "keep", "num_workers", "autocast", "compile", "gradient_checkpointing", "parallel", "seed",
)  # fmt: skip


def run_train(args: argparse.Namespace) -> Outcome | int:
    if lacking := [f"--{name}" for name in NEEDED if getattr(args, name) is None]:
        raise PeftliteError(
            f"train needs {', '.join(lacking)}: give what it lacks, or a --config that has it"
        )
    method, out = _method(args), Path(args.out)
    if not args.resume and Checkpoints(out, keep=1).finished():
        raise FileError(
            f"{args.out!r} has checkpoints already: --resume goes on from them; to begin anew, "
            "give another folder"
        )
    trainer = _trainer(args, method, out)
    with _ended_by_interrupt(trainer):
        history = trainer.fit(resume=args.resume)
    if history.stopped == "asked":
        step = history.events[-1]["step"]
        where = f"interrupted after step {step} of {trainer.total_steps}, which {args.out!r} keeps"
        print(f"peftlite: {where}: --resume goes on from there", file=sys.stderr)
        return INTERRUPTED
    if not is_first():
        return 0
    history.to_csv(out / "history.csv")
    return _outcome(trainer, history, out)


@contextmanager
def _ended_by_interrupt(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C ends training after the step at hand, which is kept; a second one ends it at once."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGINT, before)
        trainer.stop()
        print("\nending after this step; Ctrl-C again ends at once", file=sys.stderr)

    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler
    if ours and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is stop:
            signal.signal(signal.SIGINT, before)


# -- the method


def _method(args: argparse.Namespace) -> Method:
    """The method by its name, with the options that were given."""
    known = {name.lower(): kind for name, kind in Method.known.items()}
    kind = known.get(args.method.lower())
    if kind is None:
        near = get_close_matches(args.method.lower(), known) or sorted(known)
        named = listed((known[name].__name__ for name in near), 99)
        raise PeftliteError(f"no method is called {args.method!r}; there are {named}")
    named = {name: getattr(args, name) for name in ("rank", "alpha", "targets", "exclude")}
    options = {name: value for name, value in named.items() if value is not None}
    options |= dict(map(key_and_value, args.set or []))
    own = {field.name: field for field in fields(kind) if field.init}
    if unknown := [name for name in options if name not in own]:
        raise PeftliteError(f"{kind.__name__} has no {listed(unknown)}: it has {listed(own, 99)}")
    needed = [
        name for name, field in own.items()
        if name not in options and field.default is field.default_factory is MISSING
    ]  # fmt: skip
    if needed:
        raise PeftliteError(f"{kind.__name__} needs {listed(needed)}: give --set {needed[0]}=…")
    return kind(**options)


# -- the training


def _trainer(args: argparse.Namespace, method: Method, out: Path) -> Trainer:
    """A trainer of a new delta of the model; prints the plan and the settings."""
    device = local.device(args.device or local_device())
    tokenizer, config = local.tokenizer(args.model), local.config(args.model)
    most = getattr(config, "max_position_embeddings", None)
    paired = args.loss == "contrastive"
    read: Callable[[str], data.Data] = partial(
        _pairs if paired else _examples, tokenizer=tokenizer, length=args.max_length, most=most
    )
    train, val = _parts(args, read)
    made = local.encoder if paired else local.model
    model = made(args.model, args.dtype, args.quantize)
    if not will_shard(args.parallel, model):  # or each process takes its shard
        model = model.to(device)
    what = plan(model, method)
    with fork_rng(device, args.seed):
        attach(model, method, args.name or re.sub(r"[^A-Za-z0-9_-]", "-", out.resolve().name))
    given = {name: getattr(args, name) for name in SETTINGS}
    pad = partial(data.collate, pad=data.as_tokenizer(tokenizer).pad)
    trainer = Trainer(
        model,
        losses.contrastive if paired else LOSSES.get(reader_for(args.data), losses.causal_lm),
        train,
        val,
        collate=partial(_collate_sides, pad) if paired else pad,
        folder=out,
        callbacks=[Progress()],
        progress=False,
        **{name: value for name, value in given.items() if value is not None},
    )
    if is_first():
        print(what, trainer, sep="\n\n", file=sys.stderr)
    return trainer


def _parts(
    args: argparse.Namespace, read: Callable[[str], data.Data]
) -> tuple[data.Data, data.Data | None]:
    """What to train on, and what to validate on: none, a file, or a share of the former."""
    share = as_share(args.validation)
    if share is not None and not 0 < share < 1:
        raise PeftliteError(
            f"--validation is a file, or a share of the data above 0 and below 1: not {share:g}"
        )
    paths = [args.data, *([args.validation] if args.validation and share is None else [])]
    found = {path: read(path) for path in paths}
    if empty := [path for path in paths if not len(found[path])]:
        raise FileError(f"{empty[0]!r} has no examples")
    if share is None:
        return found[args.data], found.get(args.validation)
    rest, val = found[args.data].split(share, seed=args.seed)
    return rest, val


def _examples(path: str, tokenizer: Any, length: int | None, most: int | None) -> data.Data:
    """What the first row of a file is, such as chats or pairs; or the one text of another file."""
    reader = reader_for(path)
    if reader == "text":
        piece = min(PIECE, most or PIECE) if length is None else length
        source = path if has_rows(path) else [*filter(str.strip, [plain_text(path)])]
        return data.text(source, tokenizer, length=piece)
    return getattr(data, reader)(path, tokenizer, max_length=most if length is None else length)


def _pairs(path: str, tokenizer: Any, length: int | None, most: int | None) -> data.Data:
    """Both sides of each pair, as the tokenizer writes a text."""

    def side(text: str) -> dict[str, Tensor]:
        ids = tokenizer(text, truncation=True, max_length=length or most)["input_ids"]
        return {"input_ids": torch.tensor(ids)}

    rows = data.pairs(path, tokenizer).rows
    return data.Data(rows, lambda row: (side(row["prompt"]), side(row["response"])))


def _collate_sides(collate: Callable[[Any], Any], examples: list[Any]) -> tuple[Any, ...]:
    return tuple(collate(list(side)) for side in zip(*examples, strict=True))


# -- what comes of it


def _outcome(trainer: Trainer, history: History, out: Path) -> Outcome:
    """Leaves the delta as after the best epoch, or the last where none is known to be the best."""
    (delta,) = trainer.deltas
    path = out / f"{delta.name}.safetensors"
    last = out / Checkpoints(out, keep=1).finished()[-1]
    with replacing(path) as file:
        file.write(((history.best or last) / path.name).read_bytes())
    best = None if history.best is None else history.best.name
    kept = "as after the last step" if best is None else f"as in {best}, the best"
    return Outcome(
        f"{history}\nwritten to {path}: {size(path.stat().st_size)}, {kept}",
        {
            "delta": str(path), "parameters": delta.num_parameters, "best": best,
            "stopped": history.stopped, "settings": trainer.settings(), "epochs": history.epochs,
        },
    )  # fmt: skip
