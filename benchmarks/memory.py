"""Bytes that a LoRA linear keeps for its backward pass beyond its input and its parameters.

The frozen base keeps none; `tokens x r` numbers and the seed of a dropout are enough.
On a GPU, also the peak of a step.
"""

import argparse
from collections.abc import Callable, Iterator

import peft
import torch
from common import Figure, report
from lora_linear import DROPOUTS, DTYPES, RANK, Cell, contenders, step
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def kept(layer: Callable[[Tensor], Tensor], x: Tensor) -> int:
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


def peak(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(layer, x, dy)
    return torch.cuda.max_memory_allocated() - before


def measure(cell: Cell) -> Iterator[Figure]:
    x, dy = cell.rows(cell.i).requires_grad_(), cell.rows(cell.o)
    seed = 8 if cell.dropout else 0
    enough = cell.tokens * cell.rank * cell.dtype.itemsize + seed
    for name, layer in contenders(cell).items():
        bound = enough if name.startswith("peftlite") else None
        yield _constant(f"{cell}, {name}, kept", kept(layer, x), bound)
        if cell.device == "cuda":
            yield _constant(f"{cell}, {name}, peak", peak(layer, x, dy))


def _constant(name: str, count: int, at_most: float | None = None) -> Figure:
    return Figure(name, [float(count)] * 2, "B", at_most=at_most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="no CSV file")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    cells = [
        Cell(args.device, dtype, 1024, 1024, 1024, RANK, dropout)
        for dtype in DTYPES[args.device]
        for dropout in DROPOUTS
    ]
    report(
        "memory" if args.device == "cpu" else "memory_cuda",
        [figure for cell in cells for figure in measure(cell)],
        quick=args.quick,
        peft=peft.__version__,
    )


if __name__ == "__main__":
    main()
