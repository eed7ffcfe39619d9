"""Data: read and checked, split, packed, collated, augmented; `pl.data`."""

from peftlite.train.data import augment as augment
from peftlite.train.data.balance import class_weights as class_weights
from peftlite.train.data.dataset import Data as Data
from peftlite.train.data.packing import block_mask as block_mask
from peftlite.train.data.padding import collate as collate
from peftlite.train.data.report import Estimate as Estimate
from peftlite.train.data.report import Report as Report
from peftlite.train.data.report import estimate as estimate
from peftlite.train.data.report import validate as validate
from peftlite.train.data.sources import chat as chat
from peftlite.train.data.sources import pairs as pairs
from peftlite.train.data.sources import text as text
from peftlite.train.data.tokens import CHATML as CHATML
from peftlite.train.data.tokens import ByteTokenizer as ByteTokenizer
from peftlite.train.data.tokens import Tokenizer as Tokenizer
from peftlite.train.data.tokens import as_tokenizer as as_tokenizer
