"""The command line: `peftlite <command>`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


_OUT = {"-o --out": {"required": True, "metavar": "OUT", "help": "what to write"}}
_FILE = {"metavar": "FILE", "help": "a delta's file, peftlite's or a peer's"}
_BASE = "a safetensors file, or a folder of shards with their index"
_TRANSPOSED = {
    "--transposed": {
        "action": "store_true",
        "help": "matrices that no file tells of are stored (inputs, outputs), as GPT-2's are",
    }
}
_SVD = {
    "--rank": {"type": int, "metavar": "R", "help": "the rank to keep, at most"},
    "--energy": {
        "type": float,
        "metavar": "SHARE",
        "help": "keep this share of the squared singular values, by the smallest rank that does",
    },
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
            "--base": {"metavar": "BASE", "help": f"a checkpoint: {_BASE}"},
        },
        commands.run_verify,
    ),
    "diff": Command(
        "how two files differ: methods, sites, and the largest difference in each tensor",
        {
            "a": {"metavar": "A", "help": "a delta's file, or any of safetensors"},
            "b": {"metavar": "B", "help": "another"},
        },
        commands.run_diff,
    ),
    "convert": Command(
        "writes a delta in another format; a pickle is read only here, and for tensors alone",
        {
            "file": _FILE,
            "out": {"metavar": "OUT", "help": "the file, or the folder, to write"},
            "--to": {
                "choices": get_args(To),
                "default": "safetensors",
                "help": "the format; safetensors leaves the names as they are (default)",
            },
            "--base": {"metavar": "BASE", "help": f"the base, for the other formats: {_BASE}"},
            "--alpha": {
                "type": float,
                "metavar": "NUMBER",
                "help": "alpha, for files that don't say it",
            },
            "--parts": {
                "nargs": "+",
                "metavar": "PART",
                "help": "which parts of fused weights have changes, such as: q v",
            },
            **_TRANSPOSED,
        },
        commands.run_convert,
    ),
    "merge": Command(
        "merges a delta into a checkpoint, tensor by tensor; the checkpoint stays as it is",
        {
            "base": {"metavar": "BASE", "help": f"the checkpoint: {_BASE}"},
            "delta": {"metavar": "DELTA", "help": "the delta's file"},
            **_OUT,
            "--check-base": {
                "choices": ("error", "warn", "off"),
                "default": "error",
                "help": "what to do if the base is not the one the delta was made for",
            },
        },
        commands.run_merge,
    ),
    "extract": Command(
        "writes what makes one checkpoint of another as a delta: LoRA, and the rest as it is",
        {
            "base": {"metavar": "BASE", "help": f"a checkpoint: {_BASE}"},
            "tuned": {"metavar": "TUNED", "help": "what became of it"},
            **_OUT,
            **_SVD,
            "--targets": {
                "nargs": "+",
                "metavar": "PATTERN",
                "help": "what LoRA takes (default: linear maps)",
            },
            "--exclude": {"nargs": "+", "metavar": "PATTERN", "help": "what LoRA leaves"},
            "--ignore-rest": {
                "action": "store_true",
                "help": "leave out what else differs, in place of keeping it in full",
            },
            "--name": {"default": "extracted", "help": "the delta's name (default: extracted)"},
            **_TRANSPOSED,
        },
        commands.run_extract,
    ),
    "combine": Command(
        "writes a delta that does what several do together",
        {
            "base": {"metavar": "BASE", "help": f"the checkpoint they were made for: {_BASE}"},
            "deltas": {
                "nargs": "+",
                "metavar": "FILE=WEIGHT",
                "help": "the deltas' files; a weight that isn't given is 1",
            },
            **_OUT,
            "--how": {"choices": get_args(How), "default": "sum", "help": "(default: sum)"},
            **_SVD,
            "--density": {
                "type": float,
                "metavar": "SHARE",
                "help": "of its entries that a delta keeps: for ties, dare, magnitude_prune",
            },
            "--seed": {"type": int, "default": 0, "help": "of dare's chance (default: 0)"},
            "--name": {"default": "combined", "help": "the delta's name (default: combined)"},
            **_TRANSPOSED,
        },
        commands.run_combine,
    ),
    "validate-data": Command(
        "every problem of a chat JSONL file by its line, its tokens, and what training takes",
        {
            "file": {"metavar": "FILE", "help": "the file to train on"},
            "--validation": {"metavar": "FILE", "help": "another, which is to share no example"},
            "--tokenizer": {
                "metavar": "DIR",
                "help": "a folder of transformers, with a chat template (default: bytes)",
            },
            "--max-length": {
                "type": int,
                "metavar": "N",
                "help": "tokens after which an example is cut off",
            },
        },
        commands.run_validate_data,
    ),
    "compare": Command(
        "what a model writes by itself and with each delta, side by side, the likeliest token next",
        {
            "model": {"metavar": "MODEL", "help": "a local folder of transformers"},
            "deltas": {"nargs": "+", "metavar": "DELTA", "help": "the deltas' files"},
            "--prompts": {
                "required": True,
                "metavar": "FILE",
                "help": "a prompt a line; in a .jsonl file chats, or pairs of prompt and response",
            },
            "--max-new-tokens": {
                "type": int,
                "default": 64,
                "metavar": "N",
                "help": "to write, at most (default: 64)",
            },
        },
        commands.run_compare,
    ),
    "train": Command(
        "trains a delta of a local model on chats, pairs or text; goes on after a break",
        {
            "--model": {
                "required": True,
                "metavar": "DIR",
                "help": "a local folder of transformers",
            },
            "--data": {
                "required": True,
                "metavar": "FILE",
                "help": "JSONL of chats (messages), pairs (prompt, response) or texts (text); "
                "a file that isn't called .jsonl is one text",
            },
            "--validation": {
                "metavar": "FILE",
                "help": "another file, or the share of the data that is held out, such as 0.1",
            },
            "-o --out": {
                "required": True,
                "metavar": "DIR",
                "help": "a folder for the delta, events.jsonl, history.csv and checkpoints",
            },
            "--name": {"help": "the delta's name (default: the folder's)"},
            "--method": {"default": "LoRA", "help": "any of peftlite's by name (default: LoRA)"},
            "--rank": {"type": int, "metavar": "R", "help": "of the method"},
            "--alpha": {"type": float, "metavar": "NUMBER", "help": "of the method"},
            "--targets": {"nargs": "+", "metavar": "PATTERN", "help": "what the method takes"},
            "--exclude": {"nargs": "+", "metavar": "PATTERN", "help": "what the method leaves"},
            "--set": {
                "nargs": "+",
                "default": [],
                "metavar": "KEY=VALUE",
                "help": "any other option of the method",
            },
            "--loss": {
                "choices": ("causal_lm", "contrastive"),
                "default": "causal_lm",
                "help": "contrastive: by pairs, to tell which two texts belong together "
                "(default: causal_lm)",
            },
            "--max-length": {
                "type": int,
                "metavar": "N",
                "help": "tokens of an example, or of a piece of text "
                "(default: what the model takes; 512 for text)",
            },
            "--epochs": {"type": int, "metavar": "N", "help": "(default: by the examples)"},
            "--batch-size": {"type": int, "metavar": "N", "help": "(default: by the examples)"},
            "--accumulate": {"type": int, "metavar": "N", "help": "parts that a batch comes in"},
            "--lr": {"type": float, "metavar": "RATE", "help": "(default: by method and width)"},
            "--lr-multiplier": {"type": float, "metavar": "TIMES", "help": "of that rate"},
            "--patience": {
                "type": int,
                "metavar": "N",
                "help": "epochs without a better validation loss after which to stop",
            },
            "--autocast": {"choices": ("bf16", "fp16"), "help": "for the forward pass"},
            "--parallel": {
                "choices": ("auto", "ddp", "fsdp"),
                "default": "auto",
                "help": "in the processes of `torchrun -m peftlite train`: ddp, the whole model in "
                "each; fsdp, the base spread over them (default: ddp if it fits)",
            },
            "--gradient-checkpointing": {
                "action": "store_true",
                "help": "compute activations again instead of keeping them",
            },
            "--device": {"help": "(default: an accelerator if there is one, else cpu)"},
            "--seed": {"type": int, "default": 0, "help": "of all chance (default: 0)"},
            "--resume": {
                "action": "store_true",
                "help": "go on from the newest checkpoint in the folder, or begin if it has none",
            },
        },
        commands.run_train,
    ),
    "demo": Command(
        "two deltas on one small language model, and every law measured on them: 2 minutes",
        {
            "--fresh": {"action": "store_true", "help": "train the base even if it is cached"},
            "--cache": {
                "type": Path,
                "metavar": "DIR",
                "help": "a folder for the base and the deltas (default: ~/.cache/peftlite)",
            },
        },
        _demo,
    ),
}

_CODES = "exit codes: 0 all well; 1 a finding, such as damage or a difference; 2 an error"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 1 for a finding, 2 for an error."""
    args = _parser().parse_args(argv)
    try:
        outcome = args.run(args)
    except (PeftliteError, OSError) as error:
        print(f"peftlite: {error}", file=sys.stderr)
        return 2
    if isinstance(outcome, int):
        return outcome
    print(json.dumps(outcome.data, indent=2, default=str) if args.json else outcome.text)
    return int(outcome.amiss)


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
        subparser.set_defaults(run=command.run)
    return parser
