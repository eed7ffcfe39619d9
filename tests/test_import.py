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

# a few lines of Python each
ALLOWED = {"safetensors.torch", "secrets", "hmac"}


def test_imports_nothing_else() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True
    )
    new = set(json.loads(result.stdout))
    assert "peftlite" in new
    others = {name for name in new if name.split(".")[0] != "peftlite"} - ALLOWED
    outermost = sorted(name for name in others if name.rpartition(".")[0] not in others)
    assert not outermost, f"import these where they are used: {outermost}"
