"""Compiles every kernel, without a GPU, and prints its registers and stack; run by test_triton.

python compile_all.py RANK [RANK ...]
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peftlite.kernels import triton_kernels
from peftlite.kernels.triton_ops import tiles

KERNELS = ("shrink", "grad_ab", "grad_a", "expand")
PLANES = {"shrink": {"h_ptr"}, "grad_ab": {"dh_ptr", "db_ptr"}, "grad_a": {"da_ptr"}, "expand": ()}
DUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def signature(kernel: triton.JITFunction, constants: dict[str, int]) -> dict[str, str]:
    """As the launcher has it for contiguous matrices of bf16: planes are fp32, the seed int64."""

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            planes = PLANES[kernel.fn.__name__]
            return "*i64" if name == "seed_ptr" else "*fp32" if name in planes else "*bf16"
        return "i32"

    return {name: kind(name) for name in kernel.arg_names}


def compiled(name: str, architecture: int, rank: int) -> dict[str, object]:
    kernel = getattr(triton_kernels, name)
    config = tiles(rank)
    options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
    constants = config | {"DROP": True, "WIDEN": False}
    constants |= {arg: 1 for arg in kernel.arg_names if arg.endswith("_column")}
    constants = {arg: constants[arg] for arg in kernel.arg_names if arg in constants}
    found = signature(kernel, constants)
    # what the launcher sees of real pointers and sizes: without it no load is a wide one
    even = {arg for arg in found if arg not in constants and arg != "threshold"}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, arg in enumerate(kernel.arg_names) if arg in even
    }
    source = ASTSource(kernel, found, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, stack = resources(made.asm["cubin"])
    return {
        "kernel": name,
        "sm": architecture,
        "rank": rank,
        "registers": registers,
        "stack": stack,
        "tensor cores": bool(re.search("wgmma|mma.sync", made.asm["ptx"])),
        "asynchronous": "cp.async" in made.asm["ptx"],
    }


def resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [DUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
    return int(registers), int(stack)


def report(ranks: list[int]) -> Iterator[dict[str, object]]:
    for name, architecture, rank in itertools.product(KERNELS, (80, 90), ranks):
        yield compiled(name, architecture, rank)


if __name__ == "__main__":
    for row in report([int(rank) for rank in sys.argv[1:]]):
        print(json.dumps(row), flush=True)
