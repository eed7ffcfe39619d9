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
# for each factor's dtype, on the newer GPU: four and three blocks of four warps a multiprocessor
MOST_REGISTERS = {"bf16, bf16": 128, "fp16, fp16": 128, "bf16, fp32": 168, "fp16, fp32": 168}
MOST_SHARED = {80: 163 * 2**10, 90: 227 * 2**10}
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux alone"),
]


@pytest.mark.parametrize("what", ["", "_beside", "_packed", "_rows"])
def test_is_the_reference(what: str) -> None:
    # the interpreter is chosen when triton is imported: in a process of its own, off a GPU
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    # triton 3.6's interpreter loops so
    allowed = "ignore:Conversion of an array with ndim:DeprecationWarning"
    file = HERE / f"interpreted{what}.py"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-W", allowed, str(file)]
    environment = os.environ | interpret
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def compile_all(cache: Path, *ranks: int) -> list[dict]:
    paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": ":".join(paths)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(HERE / "compile_all.py"), *map(str, ranks)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def check(row: dict) -> None:
    assert row["stack"] == 0, row
    assert row["shared"] <= MOST_SHARED[row["sm"]], row
    if row["sm"] == 90 and not row["kernel"].startswith(("product", "rows' expand")):
        assert row["registers"] <= MOST_REGISTERS[row["dtypes"]], row
    if row["rank"]:
        # what the rows' expand reads, it waits for once
        assert row["asynchronous"] or row["kernel"].startswith("rows' expand"), row
        assert row["tensor cores"], row


def test_compiles_without_spills(tmp_path: Path) -> None:
    rows = compile_all(tmp_path, 16)
    assert len(rows) == 2 * 6 + 3 * 9
    for row in rows:
        check(row)


@pytest.mark.slow
def test_every_tile_compiles_without_spills(tmp_path: Path) -> None:
    for row in compile_all(tmp_path, 16, 32, 64):
        check(row)


def test_is_imported_only_when_used() -> None:
    code = "import sys, peftlite.kernels; print('triton' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "False\n", ran.stderr
