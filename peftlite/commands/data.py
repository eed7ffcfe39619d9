"""validate-data: what is wrong with a chat JSONL file."""

import argparse

from peftlite.commands.local import local_tokenizer
from peftlite.commands.outcome import Outcome
from peftlite.train.data import validate


def run_validate_data(args: argparse.Namespace) -> Outcome:
    tokenizer = None if args.tokenizer is None else local_tokenizer(args.tokenizer)
    report = validate(
        args.file, args.validation, tokenizer, max_length=args.max_length, progress=True
    )
    return Outcome(str(report), report.as_dict(), amiss=not report.ok)
