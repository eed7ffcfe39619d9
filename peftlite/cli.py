"""The command line: `peftlite <command>`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress

from peftlite.commands import config
from peftlite.commands.catalog import COMMANDS, Command
from peftlite.commands.outcome import CUT_OFF, INTERRUPTED
from peftlite.errors import PeftliteError
from peftlite.version import __version__

_VALUE = r"""(\[[^\]]*\]|'[^']*'|"[^"]*"|[^\s,;:)]*)"""
ALSO = {"val": "--validation", "model": "--base"}
"""Options that have another name in Python."""
_CODES = (
    "exit codes: 0 all well; 1 a finding, such as damage or a difference; 2 an error; "
    "130 interrupted by Ctrl-C; 141 the output's reader went away"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code, as the help has them."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return CUT_OFF
    except KeyboardInterrupt:
        line = "\n" * sys.stderr.isatty()  # that ^C is on, or a bar
        print(f"{line}peftlite: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    command = COMMANDS[args.command]
    try:
        args = _with_config(args, argv)
        if getattr(args, "print_config", False):
            print(config.written(args, command.options))
            return 0
        outcome = args.run(args)
    except BrokenPipeError:
        raise
    except (PeftliteError, OSError) as error:
        print(f"peftlite: {_as_typed(str(error), command)}", file=sys.stderr)
        return 2
    if isinstance(outcome, int):
        return outcome
    print(json.dumps(outcome.data, indent=2, default=str) if args.json else outcome.text)
    return int(outcome.amiss)


def _with_config(args: argparse.Namespace, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments with those of `--config`, which are as if typed first: later ones win."""
    if getattr(args, "config", None) is None:
        return args
    name, *typed = argv
    words = config.typed(args.config, COMMANDS[name].options)
    return _parser().parse_args([name, *words, *typed])


def _drop_output() -> None:
    """Nobody reads it any more: what is left is not to be written when Python ends."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _as_typed(message: str, command: Command) -> str:
    """A message in the words of the command line: `max_length=8` as `--max-length 8`."""
    options = {name: f"--{name.replace('_', '-')}" for name in command.options}
    for name, option in {**ALSO, **options}.items():
        if option in options.values():
            message = re.sub(
                rf"(?<![\w.'-]){name}(?:={_VALUE}|(?= must be | goes by ))",
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
        if command.json:
            subparser.add_argument("--json", action="store_true", help="print JSON")
        subparser.set_defaults(run=command.run, command=name)
    return parser
