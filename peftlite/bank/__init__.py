"""The bank: many deltas resident in fixed buffers, mixed row by row in one batch."""

from peftlite.bank.bank import DeltaBank

__all__ = ["DeltaBank"]
