"""`import peftlite` brings in peftlite, and nothing else that its dependencies hadn't."""

import functools
import json
import subprocess
import sys
from types import ModuleType

import pytest

import peftlite as pl
from tests import catalog

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


TRAINER = "from peftlite import Trainer"
BANK = "peftlite.DeltaBank; assert 'DeltaBank' in dir(peftlite)"


@functools.cache
def imported(use: str) -> set[str]:
    """The modules that a fresh process has more after `import peftlite`, and a use of it."""
    code = PROBE.format(use=use)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout))


@pytest.mark.heavy
def test_imports_what_is_used() -> None:
    assert imported("") == {"peftlite", "peftlite.version"}
    served = imported("peftlite.attach")
    assert "peftlite.core.attach" in served and not {"peftlite.train", "peftlite.bank"} & served
    assert "peftlite.train" in imported(TRAINER)
    assert "peftlite.train" not in imported("import peftlite.cli")
    assert "peftlite.bank" in imported(BANK)


@pytest.mark.parametrize("options", ["--help", "combine --help", "convert --to nothing"])
def test_no_help_waits_for_torch(options: str) -> None:
    code = f"""
import contextlib, sys
from peftlite.cli import main
with contextlib.suppress(SystemExit):
    main({options.split()})
assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_shows_public_names_alone() -> None:
    names = dir(pl)
    modules = {name for name in names if isinstance(getattr(pl, name), ModuleType)}
    assert modules == {"compat", "data", "kernels", "losses", "methods", "plot"}
    assert {*pl.__all__} == {*names} - {"__version__"}
    assert all(name in pl.__all__ for name in pl.Method.known if hasattr(pl, name))


def test_a_name_that_is_not_there_is_said_so() -> None:
    for name in ("Lora", "_repr_html_"):
        with pytest.raises(AttributeError, match=f"module 'peftlite' has no attribute '{name}'"):
            getattr(pl, name)


def test_the_catalog_is_what_its_files_make() -> None:
    assert catalog.FILE.read_text() == catalog.text()


@pytest.mark.parametrize("use", ["", "peftlite.attach", TRAINER, BANK])
def test_imports_nothing_else(use: str) -> None:
    new = imported(use)
    others = {name for name in new if name.split(".")[0] != "peftlite"} - ALLOWED
    outermost = sorted(name for name in others if name.rpartition(".")[0] not in others)
    assert not outermost, f"import these where they are used: {outermost}"
