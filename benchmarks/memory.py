"""Bytes that a LoRA linear keeps for its backward pass beyond its input and its parameters.

The frozen base keeps none; the `tokens x r` numbers of h, in the dtype of the factors, and the seed
of a dropout are enough; in C, h is in fp32. On a GPU, also the peak of a step.
"""

import argparse
from collections.abc import Iterator

import peft
import torch
from common import Figure, report
from contenders import DROPOUTS, DTYPES, RANK, Cell, Given, Layer, contenders, step
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from peftlite.kernels.native import low_rank


def kept(layer: Layer, x: Tensor) -> int:
    """The bytes of the storages that the forward pass allocates and keeps."""
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    new = [tensor for tensor in storages.values() if not _was_there(tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in new)


def _was_there(tensor: Tensor) -> bool:
    """Whether it is the input or a parameter, or a view of one."""
    root = tensor if tensor._base is None else tensor._base
    return (root.requires_grad and root.is_leaf) or isinstance(root, nn.Parameter)


def peak(layer: Layer, x: Tensor, dy: Tensor) -> int:
    """The most bytes that a step holds on the GPU beyond what was there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(layer, x, dy)
    return torch.cuda.max_memory_allocated() - before


def enough(cell: Cell, name: str) -> int | None:
    """What a contender of ours may keep, in bytes."""
    if not name.startswith("peftlite"):
        return None
    half = "half" in name and not (cell.device == "cpu" and low_rank.runs(cell.dtype))
    size = cell.dtype.itemsize if half else torch.float32.itemsize
    return cell.tokens * cell.rank * size + 8 * (cell.dropout > 0)


def weigh(cell: Cell, name: str, layer: Layer, x: Tensor, dy: Tensor) -> Iterator[Figure]:
    yield _count(f"{cell}, {name}, kept", kept(layer, x), enough(cell, name))
    if cell.device == "cuda":
        yield _count(f"{cell}, {name}, peak", peak(layer, x, dy))


def _count(name: str, count: int, at_most: float | None = None) -> Figure:
    return Figure(name, [float(count)] * 2, "B", at_most=at_most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="no CSV file")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    figures: list[Figure] = []
    for dtype in DTYPES[args.device]:
        for dropout in DROPOUTS:
            cell = Cell(args.device, dtype, 1024, 1024, 1024, RANK, dropout)
            x, dy = cell.rows(cell.i).requires_grad_(), cell.rows(cell.o)
            for name, layer in contenders(Given(cell), compiled=False).items():
                figures += weigh(cell, name, layer, x, dy)
    report(
        "memory" if args.device == "cpu" else "memory_cuda",
        figures,
        quick=args.quick,
        peft=peft.__version__,
    )


if __name__ == "__main__":
    main()
