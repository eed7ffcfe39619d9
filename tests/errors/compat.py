"""The errors of PEFT's names."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import peftlite as pl
from peftlite.compat import peft
from tests.errors.case import Case, bare, linears, on
from tests.errors.peft_files import adapter

SQL = peft.LoraConfig(r=2, target_modules=["q_proj"])
LEFT_OUT = (
    ", which peftlite doesn't train as peft does: leave it out, or see what pl.attach has for "
)
LEFT_OUT += "it in docs/coming_from_peft.md"


def asking(says: str, config: str, model: Callable[[], Any] = bare, **settings: Any) -> Case:
    """A fresh adapter that can't be had."""

    def act(model: nn.Module, _: Path) -> None:
        peft.get_peft_model(model, getattr(peft, config)(**settings))

    # settings are read as a file's are
    kind = pl.FileError if "megatron_config" in settings or config[0] == "B" else pl.PeftliteError
    return Case(act, says, kind, model)


def two() -> Any:
    model = peft.get_peft_model(bare(), SQL, "sql")
    model.add_adapter("chat", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    return model


def doing(says: str, act: Callable[[Any, Path], Any], model: Callable[[], Any] = two) -> Case:
    return Case(act, says, model=model)


def weighing(says: str, *how: Any, model: Callable[[], Any] = two, **options: Any) -> Case:
    def act(model: Any, _: Path) -> None:
        names = list(model.peft_config)
        model.add_weighted_adapter(names, [1.0] * len(names), "both", *how, **options)

    return doing(says, act, model)


def scaled() -> Any:
    return peft.get_peft_model(bare(), peft.HRAConfig(r=2, target_modules=["q_proj"]))


def typed() -> nn.Module:
    model: Any = linears()
    model.config = types.SimpleNamespace(model_type="bert")
    return model


CASES = [
    asking("'LoraConfig' is a LORA with 'megatron_config' as {'a': 1}, which may change the model "
           "in a way that peftlite doesn't have", "LoraConfig",
           target_modules=["q_proj"], megatron_config={"a": 1}),
    asking("'LoraConfig' has 'init_lora_weights' as 'corda'" + LEFT_OUT, "LoraConfig",
           target_modules=["q_proj"], init_lora_weights="corda"),
    asking("'LoraConfig' has 'lora_bias' as True" + LEFT_OUT, "LoraConfig",
           target_modules=["q_proj"], lora_bias=True),
    asking("'LoraConfig' has 'init_lora_weights' as 'eva'" + LEFT_OUT, "LoraConfig",
           target_modules=["q_proj"], init_lora_weights="eva"),
    asking("peft has no default target_modules of its LORA for a GPT: say target_modules=, such as "
           "'all-linear'", "LoraConfig"),
    asking("peft has no default target_modules of its LN_TUNING for a bert: say target_modules=, "
           "such as 'all-linear'", "LNTuningConfig", typed),
    asking("'LoraConfig' has ['query'] for its targets, and no module is called that; there are, "
           "among others: …", "LoraConfig", target_modules=["query"]),
    asking("1 is a GELU, which peft's LORA doesn't take, or not as it runs: leave it out of "
           "target_modules, or use pl.attach", "LoraConfig",
           lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU()), target_modules=["0", "1"]),
    asking("lm_head.weight is tied to embed.weight, and peft would train it apart from that: untie "
           "them first, or let pl.attach change both", "LoraConfig", on("gpt_tied"),
           target_modules=["lm_head"]),
    asking("'LoraConfig' has tokens of words, which no module is called", "LoraConfig",
           target_modules=["q_proj"], trainable_token_indices={"words": [1]}),
    asking("'LoraConfig' has 1 in 'modules_to_save', whose running statistics stay the base's "
           "here: leave it out", "LoraConfig",
           lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), target_modules=["0"],
           modules_to_save=["1"]),
    asking("'LoraConfig' has 'bias' as 'boft_only'" + LEFT_OUT, "LoraConfig",
           target_modules=["q_proj"], bias="boft_only"),
    asking("'BOFTConfig' has 'boft_block_size' as 3 and 'boft_block_num' as 0: one of them is 0, "
           "and the other divides the 16 inputs of blocks.0.attn.q_proj", "BOFTConfig",
           target_modules=["q_proj"], boft_block_size=3),
    asking("LoraConfig takes no rank=; it takes task_type, …", "LoraConfig", rank=3),
    doing("no adapter is named 'poem'; there are: sql, chat",
          lambda model, _: model.delete_adapter("poem")),
    doing("a folder of peftlite's holds what an adapter changes, and no embedding of the base's: "
          "leave save_embedding_layers= out, and have those that train in modules_to_save",
          lambda model, path: model.save_pretrained(path, save_embedding_layers=True)),
    doing("peftlite writes no pickles: leave safe_serialization= out",
          lambda model, path: model.save_pretrained(path, safe_serialization=False)),
    Case(lambda _, path: peft.AutoPeftModelForCausalLM.from_pretrained(path), "'…' doesn't say "
         "what its base is: load that yourself, then PeftModel.from_pretrained(base, path)",
         file=adapter()),
    weighing("peftlite has no svd_clamp=: leave it out", svd_clamp=0.9),
    weighing("combination_type is one of linear, …: not 'mean'", "mean"),
    weighing("combination_type='ties' takes density=, the share that is kept", "ties"),
    weighing("combination_type='linear' takes adapters of one rank: 'cat' and 'svd' take any",
             "linear"),
    weighing("add_weighted_adapter is of LoRA alone, and blocks.0.attn.q_proj.weight has HRA: "
             "pl.combine takes any", model=scaled),
]  # fmt: skip
