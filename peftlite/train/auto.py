"""Learning rates for those who give none: from published recipes, by method and width.

For low-rank deltas, the rule of Schulman et al., "LoRA Without Regret" (Thinking Machines, 2025),
with the exponent that was fitted to Llama models: the best rate of full fine-tuning falls with the
hidden width, and LoRA's is 10 times that, whatever its rank:

    lr = 5e-5 · 10 · (2000 / width)^0.781

Others are multiples of LoRA's, from the rates that their papers print beside the rule's for their
models; those marked * from the rates tuned in benchmarks/results/quality_runs.csv.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from peftlite.attach import base_parameters
from peftlite.delta import Delta

OF_LORA: Mapping[str, float] = {
    "FullTuning": 0.1,
    "VeRA": 10,  # 4e-3 to 1e-2 for RoBERTa-base: Kopiczko et al., arXiv:2310.11454
    "IA3": 6,  # 3e-3 for T0-3B: Liu et al., arXiv:2205.05638
    "Compacter": 3,  # 3e-3 for T5-base: Karimi Mahabadi et al., arXiv:2106.04647
    "LoReFT": 3,  # 9e-4 for LLaMA-7B: Wu et al., arXiv:2404.03592
    "PrefixTuning": 10,  # 5e-3 to 1e-2 for BERT-large: Liu et al., arXiv:2110.07602
    "PromptTuning": 30,  # 0.3 with Adafactor: Lester et al., arXiv:2104.08691; a tenth for AdamW *
    "FourierFT": 30,  # 3e-2 and more for RoBERTa-base: Gao et al., arXiv:2405.03003
    "LoHa": 4, "LoKr": 4, "VBLoRA": 4, "HRA": 4, "NormTuning": 4,  # *
    "OFT": 0.5,  # *
}  # fmt: skip


def learning_rate(model: nn.Module, deltas: Iterable[Delta]) -> float:
    """The rate for deltas in a model; of several methods, the one that needs the lowest decides."""
    names = {type(method).__name__ for delta in deltas for method in delta.methods}
    times = min(OF_LORA.get(name, 1) for name in names)
    return float(f"{5e-5 * 10 * times * (2000 / width(model, deltas)) ** 0.781:.2g}")


def width(model: nn.Module, deltas: Iterable[Delta]) -> int:
    """A transformer's hidden size, or the most common input width of a model's matrices."""
    config: Any = getattr(model, "config", None)
    if isinstance(hidden := getattr(config, "hidden_size", None), int):
        return hidden
    widths = Counter(p.shape[1] for _, p in base_parameters(model, deltas) if p.dim() > 1)
    return widths.most_common(1)[0][0] if widths else 2000
