"""Commands: what the command line does, each in a function of its arguments."""

from argparse import Namespace

from peftlite.commands.outcome import Outcome as Outcome

# -- each imports what it needs, torch for one, once it runs: no --help waits for that


def run_chat(args: Namespace) -> int:
    from peftlite.commands import chat

    return chat.run_chat(args)


def run_compare(args: Namespace) -> Outcome:
    from peftlite.commands import compare

    return compare.run_compare(args)


def run_file(args: Namespace) -> Outcome:
    """Runs a command that reads files of deltas or writes one: its name is in the arguments."""
    from peftlite.commands import files

    return files.RUNS[args.command](args)


def run_generate(args: Namespace) -> Outcome | int:
    from peftlite.commands import generate

    return generate.run_generate(args)


def run_train(args: Namespace) -> Outcome | int:
    from peftlite.commands import train

    return train.run_train(args)


def run_validate_data(args: Namespace) -> Outcome:
    from peftlite.commands import data

    return data.run_validate_data(args)
