"""Writes the golden deltas that this release lacks: `python -m tests.golden`.

What is there is never changed: a file that would come out otherwise is a format that has changed.
"""

import peftlite as pl
from tests.golden import HERE, write

folder = HERE / pl.__version__
folder.mkdir(exist_ok=True)
written = write(folder)
print(f"{len(written)} files, {sum(path.stat().st_size for path in written):,} bytes")
