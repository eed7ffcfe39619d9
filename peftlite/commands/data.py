"""validate-data: what is wrong with a file to train on."""

import argparse

from peftlite.commands import local
from peftlite.commands.outcome import Outcome
from peftlite.train.data import validate
from peftlite.train.data.readers import PIECE, reader_for


def run_validate_data(args: argparse.Namespace) -> Outcome:
    tokenizer = None if args.tokenizer is None else local.tokenizer(args.tokenizer)
    held = args.validation if as_share(args.validation) is None else None
    length = args.max_length
    if length is None and reader_for(args.file) == "text":
        length = PIECE
    report = validate(args.file, held, tokenizer, max_length=length, progress=True)
    return Outcome(str(report), report.as_dict(), amiss=not report.ok)


def as_share(validation: str | None) -> float | None:
    """The share of the data that is to be held out; None for a file, or nothing."""
    try:
        return None if validation is None else float(validation)
    except ValueError:
        return None
