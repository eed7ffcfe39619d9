"""The command line: `peftlite <command>`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlite.errors import PeftliteError


@dataclass(frozen=True)
class Command:
    """What a command does, its arguments as argparse takes them, and the code that runs it."""

    help: str
    arguments: Mapping[str, Mapping[str, Any]]
    run: Callable[[argparse.Namespace], int]


def _demo(args: argparse.Namespace) -> int:
    import torch

    from peftlite import demo

    # threads wait for one another at every small matrix: where cores are shared, for minutes
    torch.set_num_threads(1)
    return demo.run(args.cache or _cache(), args.fresh)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftlite"


COMMANDS = {
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    parser = argparse.ArgumentParser("peftlite", description="Parameter-efficient fine-tuning.")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        for argument, how in command.arguments.items():
            subparser.add_argument(argument, **how)
        subparser.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (PeftliteError, OSError) as error:
        print(f"peftlite: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
