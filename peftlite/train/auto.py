"""Learning rates for those who give none: from published recipes, by method and width.

For LoRA, the rule of Schulman et al., "LoRA Without Regret" (Thinking Machines, 2025), which
`hyperparam_utils.py` of their tinker-cookbook spells out: the best rate of full fine-tuning falls
with the hidden width, LoRA's is 10 times that, and with s = 32/r it is the same for every rank r:

    lr = 5e-5 · 10 · (2000 / width)^0.781 · √(32 / (s·r))

The exponent is the one fitted to Llama models. The root is ours, for other scales s: a step of
AdamW moves s·BA by about s·r·lr while only B has left its start, and by s·r·lr² later.

Other methods are multiples of the rule's rate for s = 32/r, their `rate`: × beside it is a
published rate over the rule's for the same model. Where none holds for AdamW, or none suits short
runs as well, the multiple is from the rates tuned on three small models
(benchmarks/results/quality_runs.csv), and marked *. A method that states none has 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from peftlite.core.delta import Delta
from peftlite.core.patch import Method
from peftlite.core.site import sites
from peftlite.methods import FullTuning, Gated, LoRA


def learning_rate(model: nn.Module, deltas: Sequence[Delta], b_ratio: float = 1.0) -> float:
    """The rate for deltas in a model; of several methods, the one that needs the lowest decides.

    `FullTuning` of less than the other methods train, a new head for one, goes along at their rate.
    With LoRA+ the rates of A and B have this one as their geometric mean.
    """
    wide = 5e-4 * (2000 / width(model)) ** 0.781
    rate = min(_rate(method, wide) for delta in deltas for method in _deciding(delta))
    return float(f"{rate / math.sqrt(b_ratio):.2g}")


def _rate(method: Method, of_lora: float) -> float:
    if isinstance(method, Gated):
        return _rate(method.method, of_lora)
    if isinstance(method, LoRA):
        return of_lora * _of_scale(method)
    return method.rate * (of_lora if method.rate_by_width else 1)


def _of_scale(method: LoRA) -> float:
    """√(32 / (s·r)); and a half * where both factors are of full size from the beginning."""
    if method.init in ("pissa", "olora", "lora_ga", "corda"):
        return 0.5
    return math.sqrt(32 / (method.scale * method.rank))


def _deciding(delta: Delta) -> list[Method]:
    """The methods that the rate has to suit."""
    entire = [p for p in delta.placed.values() if isinstance(p.method, FullTuning)]
    count = sum(parameter.numel() for p in entire for parameter in p.patch.parameters())
    goes_along = 2 * count < delta.num_parameters
    return [m for m in delta.methods if not (goes_along and isinstance(m, FullTuning))]


def width(model: nn.Module) -> int:
    """A transformer's hidden size, or the most common input width of a model's matrices."""
    config: Any = getattr(model, "config", None)
    for each in (config, getattr(config, "text_config", None)):
        if isinstance(hidden := getattr(each, "hidden_size", None), int):
            return hidden
    tensors = (site.whole for site in sites(model) if not site.is_call)
    widths = Counter(w.shape[1] for w in tensors if w.dim() > 1)
    return widths.most_common(1)[0][0] if widths else 2000
