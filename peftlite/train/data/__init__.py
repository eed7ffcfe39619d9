"""Data: read and checked, split, packed, collated, augmented; `pl.data`."""

from peftlite.train.data import augment
from peftlite.train.data.balance import class_weights
from peftlite.train.data.dataset import Data
from peftlite.train.data.packing import Blocks, block_mask
from peftlite.train.data.padding import collate
from peftlite.train.data.report import Estimate, Report, estimate, validate
from peftlite.train.data.sources import chat, pairs, preference, ratings, text
from peftlite.train.data.stream import Stream
from peftlite.train.data.tokens import CHATML, ByteTokenizer, Tokenizer, as_tokenizer

__all__ = [
    "CHATML", "Blocks", "ByteTokenizer", "Data", "Estimate", "Report", "Stream", "Tokenizer",
    "as_tokenizer", "augment", "block_mask", "chat", "class_weights", "collate", "estimate",
    "pairs", "preference", "ratings", "text", "validate",
]  # fmt: skip
