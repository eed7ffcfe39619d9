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

import torch
import triton
from candidates import fused_product
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peftlite.kernels.triton import kernels as triton_kernels
from peftlite.kernels.triton import ops as triton_ops
from peftlite.kernels.triton import packed as triton_packed
from peftlite.kernels.triton import rescale as triton_rescale
from peftlite.kernels.triton import rows as triton_rows
from peftlite.kernels.triton import sparse as triton_sparse

DUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DTYPES = [(x, factor) for x in (torch.bfloat16, torch.float16) for factor in (x, torch.float32)]
WIDEST = {80: DTYPES[1:2], 90: DTYPES[:2]}

PLANES = {"shrink": ["h"], "grad_ab": ["dh", "db"], "grad_a": ["da"]}
FACTORS = {"a", "b", "up", "h", "dh", "sum"}
KINDS = {"seed": "i64", "slots": "i64", "ranks": "i32", "index": "i32"}
KINDS |= {"codes": "u8", "absmax": "u8"}
KINDS |= dict.fromkeys(("values", "nested", "offset", "levels"), "fp32")
KINDS |= dict.fromkeys(("scale", "planes", "change", "sums", "out"), "fp32")
# what isn't divisible by 16, as the launcher sees it
ODD = {"threshold", "scale", "each", "planes"}

NO_LOOP = {"num_warps": 4, "num_stages": 3}

Case = tuple[str, triton.JITFunction, dict[str, int | bool]]


def cases(
    rank: int, dtype: torch.dtype, factors: torch.dtype, architecture: int, all: bool
) -> Iterator[Case]:
    """Kernels with the tiles that they are launched with; or those of them that need the most."""
    tiles = triton_ops.tiles(rank, dtype, factors)
    for drop in (True, False)[: 1 + all]:
        for name in ("shrink", "grad_a", "expand"):
            config = tiles | {"DROP": drop, "BIAS": not drop, "ADD": True}
            yield f"{name}{' drop' * drop}", getattr(triton_kernels, name), config
    if rank <= triton_ops.ONCE:
        yield "grad_ab", triton_kernels.grad_ab, tiles
    for each, name in ((1, "decode"), (512, "prefill")):
        config = triton_rows.tiles(each, rank, dtype, factors)
        yield f"rows' shrink, {name}", triton_rows.shrink, config
        yield f"rows' expand, {name}", triton_rows.expand, config | {"SPLITS": 16}
    # the first is too large for the older GPU
    configs = fused_product.CONFIGS[architecture == 80 :]
    for config in configs if all else configs[:1]:
        name = "product {TOKENS}×{COLUMNS}".format(**config)
        more = {"RANK": fused_product.RANK, "BIAS": False, "DROP": True}
        yield name, fused_product._product, config | more


def cases_of_no_rank() -> Iterator[Case]:
    yield "total", triton_kernels.total, {"NUMBERS": triton_ops.NUMBERS, **NO_LOOP}
    for name in ("forward", "backward"):
        config = triton_rescale.TILE | {"BIAS": True, "num_stages": 3}
        yield f"rescale, {name}", getattr(triton_rescale, name), config
    config = {"BLOCKS": 16, "HALF": 32, "NESTED": True, **NO_LOOP}
    yield "packed, form", triton_packed.form, config
    yield "packed, few", triton_packed.few, config | {"ROWS": 4, "BIAS": True}
    yield "grad_values", triton_sparse._sampled, triton_sparse.TILE | {"num_stages": 3}


def signature(case: Case, dtype: torch.dtype, factors: torch.dtype) -> dict[str, str]:
    """As the launcher has it for contiguous matrices."""
    name, kernel, constants = case
    wide = [*PLANES.get(kernel.fn.__name__, []), *["h"] * name.startswith("rows")]

    def kind(arg: str) -> str:
        if arg in constants:
            return "constexpr"
        if not arg.endswith("_ptr"):
            return "fp32" if arg == "scale" else "i32"
        what = arg.removesuffix("_ptr")
        found = NAMES[torch.float32 if what in wide else factors if what in FACTORS else dtype]
        return "*" + KINDS.get(what, found)

    return {arg: kind(arg) for arg in kernel.arg_names}


def compiled(
    case: Case, architecture: int, dtype: torch.dtype, factors: torch.dtype
) -> dict[str, object]:
    name, kernel, config = case
    options = {key: config[key] for key in ("num_warps", "num_stages")}
    constants = config | {arg: 1 for arg in kernel.arg_names if arg.endswith("_column")}
    constants = {arg: constants[arg] for arg in kernel.arg_names if arg in constants}
    found = signature((name, kernel, constants), dtype, factors)
    # what the launcher sees of real pointers and sizes: without it no load is a wide one
    even = {arg for arg in found if arg not in constants and arg not in ODD}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, arg in enumerate(kernel.arg_names) if arg in even
    }
    source = ASTSource(kernel, found, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, stack = resources(made.asm["cubin"])
    return {
        "kernel": name,
        "sm": architecture,
        "dtypes": f"{NAMES[dtype]}, {NAMES[factors]}",
        "registers": registers,
        "stack": stack,
        "shared": made.metadata.shared,
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
    """Of one rank, what needs the most."""
    all = len(ranks) > 1
    for architecture in (80, 90):
        for case in cases_of_no_rank():
            yield {"rank": 0} | compiled(case, architecture, *DTYPES[0])
        for rank, pair in itertools.product(ranks, DTYPES if all else WIDEST[architecture]):
            for case in cases(rank, *pair, architecture, all):
                yield {"rank": rank} | compiled(case, architecture, *pair)


if __name__ == "__main__":
    for row in report([int(rank) for rank in sys.argv[1:]]):
        print(json.dumps(row), flush=True)
