"""ReFT in AdapterHub's folders: h + Pᵀ(Wh + b − Ph), or h + Pᵀ(Wh + b), as a LoReFT's tensors.

P (r, d) is any matrix (NoReFT, DiReFT), or one that torch's `orthogonal` keeps (LoReFT). With R for
the span of its rows, Pᵀ = RᵀT, and both are h + Rᵀ(W'h + b' − Rh).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from peftlite.io.peft.config import Config
from peftlite.methods.loreft import LoReFT, reflections, rotation

# whose blocks are given the mask that the model is, or which have none
MODELS = "bert roberta xlm-roberta electra distilbert gpt2 gptj llama mistral vit".split()
FREE = ("weight",)
ORTHOGONAL = ("parametrizations.weight.original", "parametrizations.weight.0.base")


class How(NamedTuple):
    """What the settings of a folder come to.

    Args:
        keys: of a module's tensors: W, b and P's of the one that runs, and then the other's.
        orthogonal: whether P is kept as torch's `orthogonal` keeps it.
        subtracts: whether Ph is subtracted.
    """

    method: LoReFT
    keys: list[str]
    orthogonal: bool
    subtracts: bool

    @classmethod
    def of(cls, config: Config, model: str) -> How:
        """Of the settings, for a type of model. Raises ValueError."""
        if model not in MODELS:
            raise ValueError(
                f"in a model of the type {model!r} adapters counts positions otherwise; these can "
                f"be read: {', '.join(MODELS)}"
            )
        first = config.take("prefix_positions", 0, int)
        last = config.take("suffix_positions", 0, int)
        tied, orthogonal = config.flag("tied_weights"), config.flag("orthogonality")
        if first and last and not tied:
            raise ValueError(
                "its first positions have another intervention than its last, and here they have "
                "the same: 'tied_weights', 'prefix_positions' or 'suffix_positions' alone"
            )
        ends = "+".join(f"{end}{n}" for end, n in (("f", first), ("l", last)) if n)
        method = LoReFT(rank=config.take("r", 1, int), positions=ends, counted="call")
        units = [0] if tied else [0, 1] if first else [1, 0]
        matrices = [f"projection.{x}" for x in (ORTHOGONAL if orthogonal else FREE)]
        own = ["learned_source.weight", "learned_source.bias", *matrices]
        keys = [f"units.{unit}.{name}" for unit in units for name in own]
        return cls(method, keys, orthogonal, subtracts(config, orthogonal or None))

    def tensors(self, get: Callable[[str], Tensor]) -> Mapping[str, Tensor]:
        """What a LoReFT has for it, of the tensors that `get` gives by their keys."""
        w, b, *its = (get(key).double() for key in self.keys[: 4 if self.orthogonal else 3])
        p = _orthogonal(*its) if self.orthogonal else its[0]
        v = reflections(p)
        r = rotation(v)
        t = r @ p.mT
        return {"v": v, "w": t @ (w - p if self.subtracts else w) + r, "b": t @ b}


def subtracts(config: Config, default: bool | None) -> bool:
    """Whether Ph is subtracted, which adapters doesn't write down. Raises ValueError."""
    said = config.take("subtract_projection", default, bool)
    if said is None:
        raise ValueError(
            "a NoReFT and a DiReFT are saved alike, and adapters itself loads both as NoReFT: "
            'add to "config" in that file "subtract_projection": true if it is a NoReFT, false '
            "if it is a DiReFT"
        )
    return said


def _orthogonal(original: Tensor, base: Tensor) -> Tensor:
    """The matrix (r, d) that torch keeps as vectors of reflections, and a base (d, d)."""
    x = original.mT
    vectors = x.tril(-1)
    q = torch.linalg.householder_product(vectors, 2 / (1 + vectors.square().sum(0)))
    return (base @ (q * x.diagonal().int())).mT
