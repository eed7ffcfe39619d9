"""What `import peftlite` costs beyond `import torch`, and peft's beside it.

Every round starts a fresh Python for each of the two; it imports torch, then times the import that
follows, so that the seconds of torch, which vary more than what is looked for, never enter.
"""

import importlib.metadata
import os
import subprocess
import sys

from common import HERE, Figure, Timer, arguments, interleave, report

PROBE = """
from time import perf_counter
import torch
start = perf_counter()
import {library}
print(perf_counter() - start)
"""


def importing(library: str) -> Timer:
    # compiled files are kept, as they are for any user after the first run
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", PROBE.format(library=library)]

    def run() -> float:
        result = subprocess.run(
            command, cwd=HERE.parent, env=environment, check=True, capture_output=True, text=True
        )
        return float(result.stdout)

    return run


def main() -> None:
    quick = arguments(__doc__).quick
    times = interleave(
        {library: importing(library) for library in ("peftlite", "peft")}, 2 if quick else 15
    )
    figures = [
        Figure("peftlite beyond torch", times["peftlite"], "s", at_most=0.05),
        Figure("peft beyond torch", times["peft"], "s"),
    ]
    report("import_time", figures, quick=quick, peft=importlib.metadata.version("peft"))


if __name__ == "__main__":
    main()
