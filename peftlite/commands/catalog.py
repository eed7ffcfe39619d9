"""Catalog: every command, with its arguments as argparse takes them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import peftlite.commands as commands
from peftlite.commands.outcome import Outcome
from peftlite.io.to import To
from peftlite.verbs.how import How


@dataclass(frozen=True)
class Command:
    """What a command does, its arguments as argparse takes them, and the code that runs it."""

    help: str
    arguments: Mapping[str, Mapping[str, Any]]
    run: Callable[[argparse.Namespace], Outcome | int]
    json: bool = True  # whether it prints JSON where it is told to

    @property
    def options(self) -> dict[str, Mapping[str, Any]]:
        """The arguments that are options, by their names in Python: `out` for `-o --out`."""
        names = {argument.split()[-1]: how for argument, how in self.arguments.items()}
        return {name[2:].replace("-", "_"): how for name, how in names.items() if name[:2] == "--"}


def _demo(args: argparse.Namespace) -> int:
    import torch

    import peftlite.demo as demo

    # threads wait for one another at every small matrix: where cores are shared, for minutes
    torch.set_num_threads(1)
    return demo.run(args.cache or _cache(), args.fresh)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftlite"


def _given(metavar: str | None, help: str, **how: Any) -> dict[str, Any]:
    stated = f"{help} (default: {how['default']})" if how.get("default") is not None else help
    return {"metavar": metavar, "help": stated, **how}


def _flag(help: str) -> dict[str, Any]:
    return {"action": "store_true", "help": help}


def _switch(help: str) -> dict[str, Any]:
    """A flag that a config may have, and that `--no-…` takes back."""
    return {"action": argparse.BooleanOptionalAction, "help": help}


def _one_of(choices: Sequence[str], help: str, default: str | None = None) -> dict[str, Any]:
    return {**_given(None, help, default=default), "choices": choices}


_whole, _number = partial(_given, type=int), partial(_given, type=float)
_several = partial(_given, nargs="+")

_OUT = {"-o --out": _given("OUT", "what to write", required=True)}
_FILE = _given("FILE", "a delta's file, peftlite's or a peer's, or ORG/NAME[@REVISION] on the hub")
_BASE = "a safetensors file, or a folder of shards with their index"
_TRANSPOSED = {
    "--transposed": _flag(
        "matrices that no file tells of are stored (inputs, outputs), as GPT-2's are"
    )
}
_SVD = {
    "--rank": _whole("R", "the rank to keep, at most"),
    "--energy": _number(
        "SHARE", "keep this share of the squared singular values, by the smallest rank that does"
    ),
}

_DTYPE = _one_of(("auto", "fp32", "bf16", "fp16"), "of the base; auto as its files have it", "auto")
_QUANTIZE = _one_of(
    ("nf4", "int8", "fp8"), "packs the base as pl.quantize does (default: as its files have it)"
)
_DEVICE = _given(None, "such as cuda:1 (default: an accelerator if there is one, else cpu)")
_CHECK_BASE = {
    "--check-base": _one_of(
        ("error", "warn", "off"),
        "what to do if the base is not the one the delta was made for",
        "error",
    )
}
_LOADING = {**_CHECK_BASE, "--dtype": _DTYPE, "--quantize": _QUANTIZE, "--device": _DEVICE}
_MODEL = _given("MODEL", "a local folder of transformers")
_PROMPTS = "a prompt a line; in a .jsonl or .json file chats, or pairs of prompt and response"
_WRITING = {
    "--system": _given(
        "TEXT", "a message that opens each chat, for a template that takes one (default: none)"
    ),
    "--max-new-tokens": _whole("N", "to write, at most", default=128),
    "--temperature": _number("T", "above 0, draw the next token (default: take the likeliest)"),
    "--top-k": _whole("K", "draw among the K likeliest (default: as the model has it)"),
    "--top-p": _number(
        "SHARE", "draw among the likeliest that have this share together (default: 1)"
    ),
    "--seed": _whole(None, "of all chance", default=0),
    **_LOADING,
}

COMMANDS = {
    "inspect": Command(
        "what is in a file: methods, sites, tensors, notes",
        {"file": _FILE},
        commands.run_file,
    ),
    "verify": Command(
        "whether a file is as it was saved, and whether a base is the one that it was made for",
        {
            "file": _FILE,
            "--base": _given("BASE", f"a checkpoint: {_BASE}"),
        },
        commands.run_file,
    ),
    "diff": Command(
        "how two files differ: methods, sites, and the largest difference in each tensor",
        {
            "a": _given("A", "a delta's file, or any of safetensors"),
            "b": _given("B", "another"),
        },
        commands.run_file,
    ),
    "convert": Command(
        "writes a delta in another format; a pickle is read only here, and for tensors alone",
        {
            "file": _FILE,
            "out": _given("OUT", "the file, or the folder, to write"),
            "--to": _one_of(
                get_args(To),
                "the format; safetensors leaves the names as they are",
                "safetensors",
            ),
            "--base": _given("BASE", f"the base, for the other formats: {_BASE}"),
            "--alpha": _number("NUMBER", "alpha, for files that don't say it"),
            "--parts": _several("PART", "which parts of fused weights have changes, such as: q v"),
            **_TRANSPOSED,
        },
        commands.run_file,
    ),
    "merge": Command(
        "merges a delta into a checkpoint, tensor by tensor; the checkpoint stays as it is",
        {
            "base": _given("BASE", f"the checkpoint: {_BASE}"),
            "delta": _given("DELTA", "the delta's file"),
            **_OUT,
            **_CHECK_BASE,
        },
        commands.run_file,
    ),
    "quantize": Command(
        "packs a checkpoint's large weights in four or eight bits; goes on after a break",
        {
            "checkpoint": _given("CHECKPOINT", _BASE),
            **_OUT,
            "--to": _one_of(("nf4", "int8", "fp8"), "the format", "nf4"),
            "--targets": _several("PATTERN", "what to pack (default: linear maps in blocks)"),
            "--skip": _several("PATTERN", "what to leave"),
            "--block": _whole("N", "weights that share one of nf4's scales", default=64),
            "--scales": _one_of(("absmax", "search"), "nf4's; search errs less", "absmax"),
            "--no-double-quant": _flag("keep nf4's scales in fp32"),
        },
        commands.run_file,
    ),
    "extract": Command(
        "writes what makes one checkpoint of another as a delta: LoRA, and the rest as it is",
        {
            "base": _given("BASE", f"a checkpoint: {_BASE}"),
            "tuned": _given("TUNED", "what became of it"),
            **_OUT,
            **_SVD,
            "--targets": _several("PATTERN", "what LoRA takes (default: linear maps)"),
            "--exclude": _several("PATTERN", "what LoRA leaves"),
            "--ignore-rest": _flag("leave out what else differs, in place of keeping it in full"),
            "--name": _given(None, "the delta's name", default="extracted"),
            **_TRANSPOSED,
        },
        commands.run_file,
    ),
    "combine": Command(
        "writes a delta that does what several do together",
        {
            "base": _given("BASE", f"the checkpoint they were made for: {_BASE}"),
            "deltas": _several("FILE=WEIGHT", "the deltas' files; a weight that isn't given is 1"),
            **_OUT,
            "--how": _one_of(get_args(How), "how they are put together", "sum"),
            **_SVD,
            "--density": _number(
                "SHARE", "of its entries that a delta keeps: for ties, dare, magnitude_prune"
            ),
            "--seed": _whole(None, "of dare's chance", default=0),
            "--name": _given(None, "the delta's name", default="combined"),
            **_TRANSPOSED,
        },
        commands.run_file,
    ),
    "validate-data": Command(
        "every problem of a file to train on by its line, its tokens, and what training takes",
        {
            "file": _given("FILE", "the file to train on"),
            "--validation": _given("FILE", "another, which is to share no example"),
            "--tokenizer": _given(
                "DIR", "a folder of transformers, with a chat template (default: bytes)"
            ),
            "--max-length": _whole("N", "tokens after which an example is cut off"),
        },
        commands.run_validate_data,
    ),
    "compare": Command(
        "what a model writes by itself and with each delta, side by side, the likeliest token next",
        {
            "model": _MODEL,
            "deltas": _several("DELTA", "the deltas' files, each PATH or NAME=PATH"),
            "--prompts": _given("FILE", _PROMPTS, required=True),
            "--max-new-tokens": _whole("N", "to write, at most", default=64),
            **_LOADING,
        },
        commands.run_compare,
    ),
    "generate": Command(
        "what a model writes after prompts, by itself or with deltas",
        {
            "model": _MODEL,
            "deltas": _given(
                "DELTA", "deltas, each PATH or NAME=PATH, which all answer each prompt", nargs="*"
            ),
            "--delta": _several("DELTA", "more of them", action="extend"),
            "--prompt": _several("TEXT", "what to answer; - is all of stdin", action="extend"),
            "--prompt-file": _given("FILE", f"{_PROMPTS}; - is stdin"),
            "--use": _several(
                "NAME",
                "which delta answers, or base, or several at once as NAME+NAME; of several, each "
                "answers one prompt (default: each delta)",
            ),
            "--without": _flag("show what the model answers by itself, too"),
            "--raw": _flag("go on from the text, though the tokenizer has a chat template"),
            **_WRITING,
        },
        commands.run_generate,
    ),
    "chat": Command(
        "a conversation with a model and deltas, which /use, /off and /load change",
        {
            "model": _MODEL,
            "deltas": _given(
                "DELTA", "deltas, each PATH or NAME=PATH, which answer together", nargs="*"
            ),
            **_WRITING,
        },
        commands.run_chat,
        json=False,
    ),
    "train": Command(
        "trains a delta of a local model on chats, pairs or text; goes on after a break",
        {
            "--config": _given("FILE", "YAML of these options, such as `rank: 16`; typed ones win"),
            "--print-config": _flag("print such a YAML of the options given, and do nothing else"),
            "--model": _given("DIR", "a local folder of transformers; needed"),
            "--data": _given(
                "FILE",
                "JSONL of chats (messages), pairs (prompt, response) or texts (text); "
                "a file that isn't called .jsonl or .json is one text; needed",
            ),
            "-o --out": _given(
                "DIR", "a folder for the delta, events.jsonl, history.csv and checkpoints; needed"
            ),
            "--validation": _given(
                "FILE", "another file, or the share of the data that is held out, such as 0.1"
            ),
            "--name": _given(None, "the delta's name (default: the folder's)"),
            "--method": _given(None, "any of peftlite's by name", default="LoRA"),
            "--rank": _whole("R", "of the method (default: the method's)"),
            "--alpha": _number("NUMBER", "of the method (default: the method's)"),
            "--targets": _several("PATTERN", "what the method takes (default: the method's)"),
            "--exclude": _several("PATTERN", "what the method leaves (default: nothing)"),
            "--set": _several("KEY=VALUE", "any other option of the method", action="extend"),
            "--loss": _one_of(
                ("causal_lm", "contrastive"),
                "contrastive: by pairs, to tell which two texts belong together",
                "causal_lm",
            ),
            "--max-length": _whole(
                "N",
                "tokens of an example, or of a piece of text "
                "(default: what the model takes; 512 for text)",
            ),
            "--epochs": _whole("N", "passes over the data (default: by the examples)"),
            "--batch-size": _whole("N", "examples of a step (default: by the examples)"),
            "--accumulate": _whole("N", "parts that a batch comes in (default: 1)"),
            "--lr": _number("RATE", "the highest learning rate (default: by method and width)"),
            "--lr-multiplier": _number("TIMES", "of that rate (default: 1)"),
            "--b-ratio": _number("TIMES", "LoRA+: how much faster B learns than A (default: 1)"),
            "--schedule": _one_of(
                ("cosine", "linear", "constant"),
                "what the rate does after the warm-up (default: cosine)",
            ),
            "--warmup": _number("SHARE", "of the steps, over which it rises (default: 0.03)"),
            "--weight-decay": _number("RATE", "of matrices (default: 0.01)"),
            "--clip": _number("NORM", "the gradients' largest norm; inf for any (default: 1)"),
            "--metric": _given(
                None,
                "by which an epoch is the best, a column of history.csv (default: full_valid_loss)",
            ),
            "--patience": _whole(
                "N", "epochs without a better metric after which to stop (default: never)"
            ),
            "--valid-every": _whole(
                "N",
                "steps from one loss on a batch of --validation to the next "
                "(default: at epochs alone)",
            ),
            "--save-every": _whole(
                "N", "steps between checkpoints within an epoch (default: at epochs alone)"
            ),
            "--check-every": _whole(
                "N", "steps between looks at whether the loss is finite (default: 1; 16 on a GPU)"
            ),
            "--keep": _whole("N", "checkpoints that stay, and the best one (default: 3)"),
            "--num-workers": _whole(
                "N", "processes that make batches ahead; no bit of the result changes (default: 0)"
            ),
            "--dtype": _DTYPE,
            "--quantize": _QUANTIZE,
            "--autocast": _one_of(
                ("bf16", "fp16"), "what the forward pass computes in (default: --dtype)"
            ),
            "--compile": _switch("train what torch.compile makes of the model"),
            "--gradient-checkpointing": _switch(
                "compute activations again instead of keeping them"
            ),
            "--parallel": _one_of(
                ("auto", "ddp", "fsdp"),
                "in the processes of `torchrun -m peftlite train`: ddp, the whole model in "
                "each; fsdp, the base spread over them; auto, ddp if it fits",
                "auto",
            ),
            "--device": _DEVICE,
            "--seed": _whole(None, "of all chance", default=0),
            "--resume": _switch(
                "go on from the newest checkpoint in the folder, or begin if it has none"
            ),
        },
        commands.run_train,
    ),
    "demo": Command(
        "two deltas on one small language model, and every law measured on them: 2 minutes",
        {
            "--fresh": _flag("train the base even if it is cached"),
            "--cache": _given(
                "DIR",
                "a folder for the base and the deltas (default: ~/.cache/peftlite)",
                type=Path,
            ),
        },
        _demo,
        json=False,
    ),
}
