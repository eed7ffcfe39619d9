"""Commands: what the command line does, each in a function of its arguments."""

from argparse import Namespace

from peftlite.commands.files import run_combine as run_combine
from peftlite.commands.files import run_convert as run_convert
from peftlite.commands.files import run_diff as run_diff
from peftlite.commands.files import run_extract as run_extract
from peftlite.commands.files import run_inspect as run_inspect
from peftlite.commands.files import run_merge as run_merge
from peftlite.commands.files import run_verify as run_verify
from peftlite.commands.outcome import Outcome as Outcome

# -- those that import the trainer, which no other waits for


def run_chat(args: Namespace) -> int:
    from peftlite.commands import chat

    return chat.run_chat(args)


def run_compare(args: Namespace) -> Outcome:
    from peftlite.commands import compare

    return compare.run_compare(args)


def run_generate(args: Namespace) -> Outcome | int:
    from peftlite.commands import generate

    return generate.run_generate(args)


def run_train(args: Namespace) -> Outcome | int:
    from peftlite.commands import train

    return train.run_train(args)


def run_validate_data(args: Namespace) -> Outcome:
    from peftlite.commands import data

    return data.run_validate_data(args)
