"""The command line: `peftlite <command>`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import peftlite.commands as commands
from peftlite.commands import Outcome
from peftlite.errors import PeftliteError
from peftlite.io.convert import To
from peftlite.verbs.combine import How
from peftlite.version import __version__


@dataclass(frozen=True)
class Command:
    """What a command does, its arguments as argparse takes them, and the code that runs it."""

    help: str
    arguments: Mapping[str, Mapping[str, Any]]
    run: Callable[[argparse.Namespace], Outcome | int]


def _demo(args: argparse.Namespace) -> int:
    import torch

    import peftlite.demo as demo

    # threads wait for one another at every small matrix: where cores are shared, for minutes
    torch.set_num_threads(1)
    return demo.run(args.cache or _cache(), args.fresh)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftlite"


def _given(metavar: str | None, help: str, **how: Any) -> dict[str, Any]:
    return {"metavar": metavar, "help": help, **how}


def _flag(help: str) -> dict[str, Any]:
    return {"action": "store_true", "help": help}


def _one_of(choices: Sequence[str], help: str, default: str | None = None) -> dict[str, Any]:
    return {"choices": choices, "help": help, "default": default}


_whole, _number = partial(_given, type=int), partial(_given, type=float)
_several = partial(_given, nargs="+")

_OUT = {"-o --out": _given("OUT", "what to write", required=True)}
_FILE = _given("FILE", "a delta's file, peftlite's or a peer's")
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

COMMANDS = {
    "inspect": Command(
        "what is in a file: methods, sites, tensors, notes",
        {"file": _FILE},
        commands.run_inspect,
    ),
    "verify": Command(
        "whether a file is as it was saved, and whether a base is the one that it was made for",
        {
            "file": _FILE,
            "--base": _given("BASE", f"a checkpoint: {_BASE}"),
        },
        commands.run_verify,
    ),
    "diff": Command(
        "how two files differ: methods, sites, and the largest difference in each tensor",
        {
            "a": _given("A", "a delta's file, or any of safetensors"),
            "b": _given("B", "another"),
        },
        commands.run_diff,
    ),
    "convert": Command(
        "writes a delta in another format; a pickle is read only here, and for tensors alone",
        {
            "file": _FILE,
            "out": _given("OUT", "the file, or the folder, to write"),
            "--to": _one_of(
                get_args(To),
                "the format; safetensors leaves the names as they are (default)",
                "safetensors",
            ),
            "--base": _given("BASE", f"the base, for the other formats: {_BASE}"),
            "--alpha": _number("NUMBER", "alpha, for files that don't say it"),
            "--parts": _several("PART", "which parts of fused weights have changes, such as: q v"),
            **_TRANSPOSED,
        },
        commands.run_convert,
    ),
    "merge": Command(
        "merges a delta into a checkpoint, tensor by tensor; the checkpoint stays as it is",
        {
            "base": _given("BASE", f"the checkpoint: {_BASE}"),
            "delta": _given("DELTA", "the delta's file"),
            **_OUT,
            "--check-base": _one_of(
                ("error", "warn", "off"),
                "what to do if the base is not the one the delta was made for",
                "error",
            ),
        },
        commands.run_merge,
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
            "--name": _given(None, "the delta's name (default: extracted)", default="extracted"),
            **_TRANSPOSED,
        },
        commands.run_extract,
    ),
    "combine": Command(
        "writes a delta that does what several do together",
        {
            "base": _given("BASE", f"the checkpoint they were made for: {_BASE}"),
            "deltas": _several("FILE=WEIGHT", "the deltas' files; a weight that isn't given is 1"),
            **_OUT,
            "--how": _one_of(get_args(How), "(default: sum)", "sum"),
            **_SVD,
            "--density": _number(
                "SHARE", "of its entries that a delta keeps: for ties, dare, magnitude_prune"
            ),
            "--seed": _whole(None, "of dare's chance (default: 0)", default=0),
            "--name": _given(None, "the delta's name (default: combined)", default="combined"),
            **_TRANSPOSED,
        },
        commands.run_combine,
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
            "model": _given("MODEL", "a local folder of transformers"),
            "deltas": _several("DELTA", "the deltas' files"),
            "--prompts": _given(
                "FILE",
                "a prompt a line; in a .jsonl or .json file chats, or pairs of prompt and response",
                required=True,
            ),
            "--max-new-tokens": _whole("N", "to write, at most (default: 64)", default=64),
        },
        commands.run_compare,
    ),
    "train": Command(
        "trains a delta of a local model on chats, pairs or text; goes on after a break",
        {
            "--model": _given("DIR", "a local folder of transformers", required=True),
            "--data": _given(
                "FILE",
                "JSONL of chats (messages), pairs (prompt, response) or texts (text); "
                "a file that isn't called .jsonl or .json is one text",
                required=True,
            ),
            "--validation": _given(
                "FILE", "another file, or the share of the data that is held out, such as 0.1"
            ),
            "-o --out": _given(
                "DIR",
                "a folder for the delta, events.jsonl, history.csv and checkpoints",
                required=True,
            ),
            "--name": _given(None, "the delta's name (default: the folder's)"),
            "--method": _given(None, "any of peftlite's by name (default: LoRA)", default="LoRA"),
            "--rank": _whole("R", "of the method"),
            "--alpha": _number("NUMBER", "of the method"),
            "--targets": _several("PATTERN", "what the method takes"),
            "--exclude": _several("PATTERN", "what the method leaves"),
            "--set": _several("KEY=VALUE", "any other option of the method", default=[]),
            "--loss": _one_of(
                ("causal_lm", "contrastive"),
                "contrastive: by pairs, to tell which two texts belong together "
                "(default: causal_lm)",
                "causal_lm",
            ),
            "--max-length": _whole(
                "N",
                "tokens of an example, or of a piece of text "
                "(default: what the model takes; 512 for text)",
            ),
            "--epochs": _whole("N", "(default: by the examples)"),
            "--batch-size": _whole("N", "(default: by the examples)"),
            "--accumulate": _whole("N", "parts that a batch comes in"),
            "--lr": _number("RATE", "(default: by method and width)"),
            "--lr-multiplier": _number("TIMES", "of that rate"),
            "--patience": _whole(
                "N", "epochs without a better validation loss after which to stop"
            ),
            "--autocast": _one_of(("bf16", "fp16"), "for the forward pass"),
            "--parallel": _one_of(
                ("auto", "ddp", "fsdp"),
                "in the processes of `torchrun -m peftlite train`: ddp, the whole model in "
                "each; fsdp, the base spread over them (default: ddp if it fits)",
                "auto",
            ),
            "--gradient-checkpointing": _flag("compute activations again instead of keeping them"),
            "--device": _given(None, "(default: an accelerator if there is one, else cpu)"),
            "--seed": _whole(None, "of all chance (default: 0)", default=0),
            "--resume": _flag(
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
    ),
}

_VALUE = r"""(\[[^\]]*\]|'[^']*'|"[^"]*"|[^\s,;:)]*)"""
_CODES = "exit codes: 0 all well; 1 a finding, such as damage or a difference; 2 an error"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 1 for a finding, 2 for an error."""
    args = _parser().parse_args(argv)
    try:
        outcome = args.run(args)
    except (PeftliteError, OSError) as error:
        print(f"peftlite: {_as_typed(str(error), COMMANDS[args.command])}", file=sys.stderr)
        return 2
    if isinstance(outcome, int):
        return outcome
    print(json.dumps(outcome.data, indent=2, default=str) if args.json else outcome.text)
    return int(outcome.amiss)


def _as_typed(message: str, command: Command) -> str:
    """A message in the words of the command line: `max_length=8` as `--max-length 8`."""
    for argument in command.arguments:
        option = argument.split()[-1]
        name = option.removeprefix("--").replace("-", "_")
        if option.startswith("--"):
            message = re.sub(
                rf"(?<![\w.'-]){name}(?:={_VALUE}|(?= must be ))",
                lambda given, option=option: f"{option} {_bare(given[1])}".rstrip(),
                message,
            )
    return message.replace("fit(--resume)", "--resume")


def _bare(value: str | None) -> str:
    """A value as it is typed: a word without quotes, a list without brackets, a flag by itself."""
    return "" if value in (None, "True") else re.sub(r"[\[\]()'\",]", "", value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "peftlite", description="Parameter-efficient fine-tuning.", epilog=_CODES
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=command.help, description=f"{command.help}.", epilog=_CODES
        )
        for argument, how in command.arguments.items():
            subparser.add_argument(*argument.split(), **how)
        if command.run is not _demo:
            subparser.add_argument("--json", action="store_true", help="print JSON")
        subparser.set_defaults(run=command.run, command=name)
    return parser
