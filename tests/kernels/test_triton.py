"""Triton's kernels without a GPU: interpreted against the reference, and compiled for two GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MOST_REGISTERS = {16: 128}  # four blocks of four warps on a multiprocessor
MOST_AT_ANY_RANK = 208
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux alone")


def test_is_the_reference() -> None:
    # the interpreter is chosen when triton is imported: in a process of its own, off a GPU
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", str(HERE / "interpreted.py")]
    environment = os.environ | interpret
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def compile_all(cache: Path, *ranks: int) -> list[dict]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": ":".join(paths)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(HERE / "compile_all.py"), *map(str, ranks)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def check(row: dict) -> None:
    assert row["stack"] == 0, row
    assert row["registers"] <= MOST_REGISTERS.get(row["rank"], MOST_AT_ANY_RANK), row
    assert row["tensor cores"] and (row["asynchronous"] or row["kernel"] == "expand"), row


def test_compiles_without_spills(tmp_path: Path) -> None:
    rows = compile_all(tmp_path, 16)
    assert len(rows) == 8
    for row in rows:
        check(row)


@pytest.mark.slow
def test_every_rank_compiles_without_spills(tmp_path: Path) -> None:
    for row in compile_all(tmp_path, 1, 8, 32, 64, 128, 256):
        check(row)


def test_is_imported_only_when_used() -> None:
    code = "import sys, peftlite.kernels; print('triton' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "False\n", ran.stderr
