"""Seconds to attach LoRA to all 224 linear maps of an 8B-shaped Llama on the meta device."""

import gc
from collections.abc import Callable
from time import perf_counter

import peft
import torch
import transformers
from common import Figure, Timer, arguments, interleave, ratios, report
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftlite as pl

CONFIG = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)


def attach_peftlite(model: nn.Module) -> None:
    pl.attach(model, pl.LoRA(rank=8))


def attach_peft(model: nn.Module) -> None:
    config = peft.LoraConfig(r=8, target_modules="all-linear")
    # its way to leave the new weights on the meta device as well
    peft.get_peft_model(model, config, low_cpu_mem_usage=True)


def attaching(attach: Callable[[nn.Module], None]) -> Timer:
    def run() -> float:
        with torch.device("meta"):
            model = LlamaForCausalLM(CONFIG)
        gc.collect()
        start = perf_counter()
        attach(model)
        return perf_counter() - start

    return run


def main() -> None:
    quick = arguments(__doc__).quick
    timers = {"peftlite": attaching(attach_peftlite), "peft": attaching(attach_peft)}
    times = interleave(timers, 2 if quick else 21)
    figures = [
        Figure("peftlite", times["peftlite"], "s", at_most=0.1),
        Figure("peft", times["peft"], "s"),
        Figure("peft / peftlite", ratios(times["peft"], times["peftlite"])),
    ]
    versions = {"peft": peft.__version__, "transformers": transformers.__version__}
    report("attach", figures, quick=quick, **versions)


if __name__ == "__main__":
    main()
