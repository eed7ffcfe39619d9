"""Writes this release's golden deltas: `python -m tests.golden`. What is there is never changed."""

import sys

import peftlite as pl
from tests.golden import HERE, write

folder = HERE / pl.__version__
if folder.exists():
    sys.exit(f"{folder} is there: a release's golden deltas stay as it wrote them")
folder.mkdir()
write(folder)
print(
    f"{len([*folder.iterdir()])} files, {sum(p.stat().st_size for p in folder.iterdir()):,} bytes"
)
