"""`import peftlite` brings in peftlite, and nothing else that its dependencies hadn't."""

import json
import subprocess
import sys

import pytest

PROBE = """
import json, sys
import torch, numpy, safetensors
before = set(sys.modules)
import peftlite
{use}
print(json.dumps(sorted(set(sys.modules) - before)))
"""

# a few lines of Python each
ALLOWED = {"safetensors.torch", "secrets", "hmac"}


def imported(use: str = "") -> set[str]:
    """The modules that a fresh process has more after `import peftlite`, and a use of it."""
    code = PROBE.format(use=use)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout))


def test_imports_what_is_used() -> None:
    new = imported()
    assert "peftlite" in new and not {"peftlite.train", "peftlite.bank"} & new
    assert "peftlite.train" in imported("from peftlite import Trainer")
    assert "peftlite.train" not in imported("import peftlite.cli")
    assert "peftlite.bank" in imported("peftlite.DeltaBank; assert 'DeltaBank' in dir(peftlite)")


@pytest.mark.parametrize("use", ["", "peftlite.train", "peftlite.bank"])
def test_imports_nothing_else(use: str) -> None:
    new = imported(use)
    others = {name for name in new if name.split(".")[0] != "peftlite"} - ALLOWED
    outermost = sorted(name for name in others if name.rpartition(".")[0] not in others)
    assert not outermost, f"import these where they are used: {outermost}"
