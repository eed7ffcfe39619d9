"""`import peftlite` brings in peftlite, and nothing else that its dependencies hadn't."""

import json
import subprocess
import sys

PROBE = """
import json, sys
import torch, numpy, safetensors
before = set(sys.modules)
import peftlite
print(json.dumps(sorted(set(sys.modules) - before)))
"""

# a few lines of Python over safetensors itself
ALLOWED = {"safetensors.torch"}


def test_imports_nothing_else() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True
    )
    new = set(json.loads(result.stdout))
    assert "peftlite" in new
    others = {name for name in new if name.split(".")[0] != "peftlite"} - ALLOWED
    packages = {".".join(name.split(".")[:2]) for name in others}
    assert not others, f"import these where they are used: {sorted(packages)[:20]}"
