"""Cases: every type of the installed peft on models, its settings one by one and in pairs."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import config as lora
from torch import Tensor, nn

from matrix.models import MODELS, Model
from peftlite.io.peft.folder import KNOWN

CONFIGS: dict[str, type[peft.PeftConfig]] = {
    str(getattr(kind, "value", kind)): config
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
}
PROMPTED = {
    name for name, config in CONFIGS.items() if issubclass(config, peft.PromptLearningConfig)
}

Settings = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One adapter of peft's on one model."""

    type: str
    model: Model
    settings: Settings

    def config(self) -> peft.PeftConfig:
        """A new one, since peft writes into those that it is given."""
        settings = {k: v() if callable(v) else v for k, v in self.settings.items()}
        return CONFIGS[self.type](**settings)

    @property
    def dtype(self) -> torch.dtype:
        """fp64, but for what peft itself computes in fp32."""
        start = self.settings.get("init_lora_weights")
        wants = isinstance(start, str) or "save_only_topk_weights" in self.settings
        return torch.float32 if wants else torch.float64

    def fresh(self) -> nn.Module:
        return self.model.fresh().to(self.dtype)

    def run(self, model: nn.Module) -> Tensor:
        return self.model.run(model, self.dtype)

    def __str__(self) -> str:
        return f"{self.type} on {self.model.name} with {_words(self.settings)}"


def _words(settings: Settings) -> str:
    shown = {k: v() if callable(v) else v for k, v in settings.items()}
    return ", ".join(f"{key}={value!r}" for key, value in shown.items())


# -- settings

# what makes a type fit such small models
SMALL: dict[str, Settings] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 9},
    "ADAMSS": {"r": 4, "num_subspaces": 2},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1},
    "BOFT": {"boft_block_size": 2},
    "C3A": {"block_size": 1},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "CPT": {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    "DEFT": {"r": 2},
    "DELORA": {"r": 2},
    "FOURIERFT": {"n_frequency": 10, "scaling": 4.0},
    "FROD": {"progressbar": False},
    "GLORA": {"r": 2},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 3},
    "HRA": {"r": 2},
    "LILY": {"r": 2},
    "LOHA": {"r": 3, "alpha": 5},
    "LOKR": {"r": 2, "alpha": 3},
    "LORA": {"r": 3, "lora_alpha": 5},
    "MISS": {"r": 2},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2},
    "OFT": {"oft_block_size": 2},
    "PEANUT": {"r": 2},
    "POLY": {"r": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PSOFT": {"r": 2},
    "PVERA": {"r": 4},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 12},
    "RANDLORA": {"r": 4, "randlora_alpha": 1},
    "ROAD": {"group_size": 2},
    "SHADOW": {"r": 2},
    "SHIRA": {"r": 1},
    "SUPERTUNING": {"sparsity": 0.5},
    "TINYLORA": {"u": 4},
    "TRAINABLE_TOKENS": {"token_indices": [1, 5, 3]},
    "UNILORA": {"theta_d_length": 11},
    "VBLORA": {"num_vectors": 7, "vector_length": 2},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 8},
}

VELORA = ("random", "batch_average", "batch_average_once")
CONFIGURED: dict[str, list[Settings]] = {
    "velora_config": [
        {"velora_config": lambda kind=kind: peft.VeloraConfig(num_groups=2, init_type=kind)}
        for kind in VELORA
    ],
    "monteclora_config": [{"monteclora_config": lambda: peft.MontecloraConfig(num_samples=2)}],
    "kasa_config": [{"kasa_config": lambda: peft.KasaConfig()}],
    "use_bdlora": [{"use_bdlora": lambda: lora.BdLoraConfig(nblocks=2)}],
    "loftq_config": [
        {"init_lora_weights": "loftq", "loftq_config": lambda: peft.LoftQConfig(loftq_bits=4)}
    ],
    "eva_config": [{"init_lora_weights": "eva", "eva_config": lambda: peft.EvaConfig()}],
    "corda_config": [{"init_lora_weights": "corda", "corda_config": lambda: lora.CordaConfig()}],
    "lora_ga_config": [
        {"init_lora_weights": "lora_ga", "lora_ga_config": lambda: peft.LoraGAConfig()}
    ],
    "arrow_config": [{"arrow_config": lambda: peft.ArrowConfig(top_k=1)}],
}
"""Settings that are configs themselves."""

NUMBERS: dict[str, list[Any]] = {
    "adapter_layers": [2], "adapter_len": [2], "alpha": [2, 6.5], "asa_exponent": [2.0],
    "block_size": [2], "boft_block_num": [{"boft_block_size": 0, "boft_block_num": 2}],
    "boft_block_size": [4, 1], "boft_n_butterfly_factor": [2, 3], "d_initial": [0.3],
    "decompose_factor": [2, 4, 1], "delora_lambda": [3], "eps": [{"coft": True, "eps": 0.5}],
    "group_size": [4], "init_r": [2], "lora_alpha": [2, 6.5], "n_frequency": [1, 30],
    "num_cayley_neumann_terms": [2, 3, 7], "num_virtual_tokens": [1, 8], "num_vectors": [3],
    "oft_block_size": [4, {"oft_block_size": 0, "r": 2}], "projection_prng_key": [7],
    "qalora_group_size": [{"use_qalora": True, "qalora_group_size": 2}], "r": [1, 8],
    "randlora_alpha": [3], "random_loc_seed": [5], "random_seed": [5], "scaling": [30.0],
    "target_r": [1], "tfinal": [{"tinit": 2, "tfinal": 3}], "topk": [1, 3],
    "vector_length": [4, 5], "encoder_num_layers": [3], "encoder_hidden_size": [20],
    "num_transformer_submodules": [1, 2], "token_dim": [], "num_attention_heads": [],
    "num_layers": [], "beta1": [0.5], "beta2": [0.5], "deltaT": [2], "total_step": [20],
    "orth_reg_weight": [0.1], "tinit": [2], "init_vector_bank_bound": [0.1],
    "init_logits_std": [0.3],
    "tokenizer_kwargs": [], "tokenizer_name_or_path": [], "prompt_tuning_init_text": [],
    "token_indices": [[0], [7, 2]],
}  # fmt: skip
"""Values of settings that are numbers or lists, beside the small one."""

TRAINED = {
    "lora_dropout", "rank_dropout", "module_dropout", "vera_dropout", "vblora_dropout",
    "boft_dropout", "hira_dropout", "encoder_dropout", "rank_dropout_scale", "beta1", "beta2",
    "deltaT", "total_step", "orth_reg_weight", "tinit", "tfinal", "init_vector_bank_bound",
    "init_logits_std", "d_initial", "random_seed",
}  # fmt: skip
"""What is for training alone: varied, and left out of the pairs."""

UNVARIED = {
    "megatron_config": "needs Megatron",
    "megatron_core": "needs Megatron",
    "runtime_config": "isn't saved",
    "mask_type": "has one value",
    "token_dim": "the model's", "num_attention_heads": "the model's", "num_layers": "the model's",
    "tokenizer_name_or_path": "needs a tokenizer", "tokenizer_kwargs": "needs a tokenizer",
    "prompt_tuning_init_text": "needs a tokenizer",
}  # fmt: skip

INITS = {
    "init_lora_weights": [False, "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4",
                          "mica"],
    "init_weights": [False, "lycoris", "gaussian"],
    "prompt_tuning_init": ["SAMPLE_VOCAB"],
}  # fmt: skip


def _named(model: Model) -> dict[str, list[Any]]:
    """Values of the settings that name parts of the model."""
    its, path = model, model.path or ""
    last = path.rpartition(".")[2]
    saved = [[name] for name in dict.fromkeys((its.head, its.norm, its.embedding)) if name]
    blocks = [{"layers_to_transform": [0]}, {"layers_to_transform": 1}] if its.blocks else []
    pattern = [{"layers_to_transform": [1], "layers_pattern": its.blocks}] if its.blocks else []
    keys = [last, f"^{path}", path, *([rf".*\.\d+\..*{last}"] if its.blocks else [])]
    where = {"target_modules": [its.embedding]}
    return {
        "target_modules": [*its.targets[1:], *([[path]] if path else []),
                           *([[its.embedding]] if its.embedding else []),
                           *([[its.norm]] if its.norm else []), f".*{last}",
                           *([[its.head]] if its.head else [])],
        "exclude_modules": [[path], f".*{last}"] if its.blocks else [],
        "layers_to_transform": blocks,
        "layers_pattern": pattern,
        "modules_to_save": [*saved, *([saved[0] + saved[1]] if len(saved) > 1 else [])],
        "rank_pattern": [{key: 2} for key in keys],
        "alpha_pattern": [{key: 7} for key in keys],
        "n_frequency_pattern": [{key: 5} for key in keys],
        "feedforward_modules": [[last], f".*{last}", [], [path]],
        "trainable_token_indices": [[1, 3], {its.embedding: [5, 0]}] if its.embedding else [],
        "target_parameters": [
            *([name] for name in its.parameters), [*its.parameters[:3]],
            {"target_modules": [], "target_parameters": [*its.parameters[:1]]},
            {"target_parameters": [*its.parameters[:2]],
             "alpha_pattern": {its.parameters[0]: 9}},
        ] if its.parameters else [[f"{last}.weight"]],
        "layer_replication": [[(0, 2), (1, 2)]] if its.task == "CAUSAL_LM" else [],
        "alora_invocation_tokens": [[3, 4]] if its.task == "CAUSAL_LM" else [],
        "ensure_weight_tying": [
            {"ensure_weight_tying": True},
            *([{"ensure_weight_tying": True, "modules_to_save": [its.embedding]},
               {"ensure_weight_tying": True, **where}] if its.embedding else []),
        ],
    }  # fmt: skip


def values(field: dataclasses.Field[Any], kind: str, model: Model) -> list[Settings]:
    """What a setting is varied to on a model, each as settings."""
    name = field.name
    found: list[Any]
    if name in CONFIGURED:
        return CONFIGURED[name]
    if name in (named := _named(model)):
        found = named[name]
    elif name in NUMBERS:
        found = NUMBERS[name]
    elif name in INITS:
        found = INITS[name]
    elif name == "bias":
        found = ["all", f"{'fourier' if kind == 'FOURIERFT' else kind.lower()}_only"]
    elif name.endswith("dropout"):
        found = [0.3]
    elif isinstance(field.default, bool):
        found = [not field.default]
    else:
        found = [value for value in _choices(field) if value != field.default]
    return [v if isinstance(v, dict) and name in v else {name: v} for v in found]


def _choices(field: dataclasses.Field[Any]) -> list[Any]:
    """The values of a setting whose type lists them."""
    kind = field.type
    found = [kind, *typing.get_args(kind)]
    lists = (typing.get_args(k) for k in found if typing.get_origin(k) is typing.Literal)
    enums = ([*k] for k in found if isinstance(k, enum.EnumMeta))
    return [*itertools.chain(*lists, *enums)]


OWN = {field.name for field in dataclasses.fields(peft.PeftConfig)}


def fields(kind: str) -> list[dataclasses.Field[Any]]:
    """The settings of a type that may change what is saved."""
    return [f for f in dataclasses.fields(CONFIGS[kind]) if f.name not in OWN]


# -- cases


def _case(kind: str, model: Model, more: Settings) -> Case:
    settings: Settings = {"task_type": model.task} if model.task else {}
    if any(field.name == "target_modules" for field in fields(kind)):
        settings["target_modules"] = model.targets[0]
    if kind == "LN_TUNING" and model.norm:
        settings["target_modules"] = [model.norm]
    if kind == "TRAINABLE_TOKENS":
        settings["target_modules"] = [model.embedding] if model.embedding else None
    if kind == "IA3":
        settings["feedforward_modules"] = []
    if kind == "ADAPTION_PROMPT":
        settings["target_modules"] = "self_attn"
    return Case(kind, model, {**settings, **SMALL.get(kind, {}), **more})


def _suits(kind: str, model: Model) -> bool:
    """Whether peft has such an adapter on such a model at all."""
    if kind in PROMPTED or kind in ("ADAPTION_PROMPT", "SHADOW", "XLORA"):
        return model.task is not None
    if kind == "TRAINABLE_TOKENS":
        return model.embedding is not None
    return True


def cases() -> list[Case]:
    """All of them, each once, the same and in the same order on every call."""
    return [*{str(case): case for case in _all()}.values()]


def _all() -> Iterator[Case]:
    for kind in CONFIGS:
        models = [model for model in MODELS.values() if _suits(kind, model)]
        if kind in KNOWN:
            yield from _plain(kind, models)
            yield from _varied(kind, models)
            yield from _paired(kind, models)
        else:  # one of a family is enough to be refused by its name
            firsts = {model.family: model for model in reversed(models)}
            yield from (_case(kind, model, {}) for model in firsts.values())


def _plain(kind: str, models: list[Model]) -> Iterator[Case]:
    """Each model."""
    yield from (_case(kind, model, {}) for model in models)


def _varied(kind: str, models: list[Model]) -> Iterator[Case]:
    """Each value of each setting, on some of the models that have it, in turns."""
    turn = 0
    for field in fields(kind):
        each = 6 if field.name == "target_modules" else 3 if kind == "LORA" else 2
        its = [(model, values(field, kind, model)) for model in models]
        its = [(model, more) for model, more in its if more]
        for i in range(max((len(more) for _, more in its), default=0)):
            having = [(model, more[i]) for model, more in its if i < len(more)]
            for k in range(min(each, len(having))):
                model, more = having[(turn + k * len(having) // each) % len(having)]
                yield _case(kind, model, more)
            turn += 1


def _paired(kind: str, models: list[Model]) -> Iterator[Case]:
    """Two settings together, on a model in turns: half of LoRA's, some of the others'."""
    turn = 0
    names = [field for field in fields(kind) if field.name not in TRAINED]
    step = {"LORA": 2, "ADALORA": 12}.get(kind, 4)
    for one, other in itertools.islice(itertools.combinations(names, 2), None, None, step):
        for k in range(len(models)):
            model = models[(turn + k) % len(models)]
            pair = values(one, kind, model), values(other, kind, model)
            if all(pair):
                first, second = (its[turn % len(its)] for its in pair)
                yield _case(kind, model, {**first, **second})
                break
        turn += 1
