"""What `import peftlite` costs beyond `import torch`, and peft's beside it.

Every round starts a fresh Python for each; it imports torch, then times what follows, so that the
seconds of torch, which vary more than what is looked for, never enter. `import peftlite` imports a
room when something of its is asked for, so what the first use costs is a figure of its own.
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
{statement}
print(perf_counter() - start)
"""


def running(statement: str) -> Timer:
    # compiled files are kept, as they are for any user after the first run
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", PROBE.format(statement=statement)]

    def run() -> float:
        result = subprocess.run(
            command, cwd=HERE.parent, env=environment, check=True, capture_output=True, text=True
        )
        return float(result.stdout)

    return run


def main() -> None:
    quick = arguments(__doc__).quick
    statements = {
        "peftlite": "import peftlite",
        "first use": "import peftlite; peftlite.attach",
        "peft": "import peft",
    }
    times = interleave({name: running(it) for name, it in statements.items()}, 2 if quick else 15)
    figures = [
        Figure("peftlite beyond torch", times["peftlite"], "s", at_most=0.03),
        Figure("peftlite and its first use beyond torch", times["first use"], "s"),
        Figure("peft beyond torch", times["peft"], "s"),
    ]
    report("import_time", figures, quick=quick, peft=importlib.metadata.version("peft"))


if __name__ == "__main__":
    main()
