"""Configs: PEFT's, with its names and defaults; what a setting means is asked in io/peft/forms/."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from peftlite.io.files import flush_folder, replacing
from peftlite.io.hub import located
from peftlite.io.peft.folder import CONFIG, PROMPTS, read_config
from peftlite.spelling import Spelled


class TaskType(str, Enum):
    """What a model does: where a prompt goes, and which head is trained and saved with it."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, Enum):
    """The methods by peft's names."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    IA3 = "IA3"
    LOHA = "LOHA"
    LOKR = "LOKR"
    HIRA = "HIRA"
    OFT = "OFT"
    BOFT = "BOFT"
    HRA = "HRA"
    VERA = "VERA"
    VBLORA = "VBLORA"
    FOURIERFT = "FOURIERFT"
    SHIRA = "SHIRA"
    LN_TUNING = "LN_TUNING"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"


@dataclass
class PeftConfig(Spelled):
    """An adapter's settings, as adapter_config.json has them."""

    task_type: Any = None
    peft_type: Any = None
    auto_mapping: Any = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    kinds: ClassVar[dict[str, type[PeftConfig]]] = {}
    """The classes by peft's name of their method."""

    @property
    def is_prompt_learning(self) -> bool:
        return self.peft_type in PROMPTS

    def to_dict(self) -> dict[str, Any]:
        """Every setting, as JSON has it."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    def given(self) -> dict[str, Any]:
        """The settings that aren't at peft's defaults, and which method they are of."""
        defaults = type(self)().to_dict()
        own = {k: x for k, x in self.to_dict().items() if x is not None and x != defaults[k]}
        return {**own, "peft_type": self.peft_type}

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        subfolder: str | None = None,
        revision: str | None = None,
        **settings: Any,
    ) -> PeftConfig:
        """The settings in a folder, here or on the hub, and others over them. Raises FileError."""
        data = {**read_config(folder_of(path, subfolder, revision)).data, **settings}
        kind = cls.kinds.get(data["peft_type"], cls)
        known = {its.name for its in fields(kind)}
        return kind(**{name: value for name, value in data.items() if name in known})

    def save_pretrained(self, path: str | os.PathLike[str], **_: Any) -> None:
        """Writes adapter_config.json into a folder."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / CONFIG) as file:
            file.write((json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n").encode())
        flush_folder(folder)


def folder_of(
    path: str | os.PathLike[str], subfolder: str | None = None, revision: str | None = None
) -> Path:
    """Where a folder is that may be on the hub, or in another. Raises FileError."""
    inside = f"{os.fspath(path)}/{subfolder}" if subfolder else path
    return located(inside, revision).path


def _plain(value: Any) -> Any:
    """A setting as JSON has it: enums by their value, sets in order."""
    if isinstance(value, Mapping):
        return {key: _plain(its) for key, its in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(its) for its in value]
    return value.value if isinstance(value, Enum) else value


_PLACES: dict[str, Any] = {"target_modules": None, "exclude_modules": None, "modules_to_save": None}
_LAYERS: dict[str, Any] = {**_PLACES, "layers_to_transform": None, "layers_pattern": None}
_TURNED: dict[str, Any] = {**_LAYERS, "fan_in_fan_out": False}
_BIASED: dict[str, Any] = {**_TURNED, "bias": "none"}
_PATTERNS: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
_LORA: dict[str, Any] = {
    "r": 8, **_BIASED, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False,
    "init_lora_weights": True, **_PATTERNS, "megatron_config": None,
    "megatron_core": "megatron.core", "trainable_token_indices": None, "loftq_config": {},
    "eva_config": None, "corda_config": None, "lora_ga_config": None, "use_dora": False,
    "velora_config": None, "alora_invocation_tokens": None, "use_qalora": False,
    "qalora_group_size": 16, "monteclora_config": None, "layer_replication": None,
    "runtime_config": None, "lora_bias": False, "target_parameters": None, "use_bdlora": None,
    "arrow_config": None, "kasa_config": None, "ensure_weight_tying": False,
}  # fmt: skip
_HADAMARD: dict[str, Any] = {
    **_PATTERNS, "r": 8, "alpha": 8, "rank_dropout": 0.0, "module_dropout": 0.0,
    "use_effective_conv2d": False, **_LAYERS, "init_weights": True,
}  # fmt: skip
_VIRTUAL: dict[str, Any] = {
    "num_virtual_tokens": None, "token_dim": None, "num_transformer_submodules": None,
    "num_attention_heads": None, "num_layers": None, "modules_to_save": None,
}  # fmt: skip


def _made(name: str, kind: str, **defaults: Any) -> Any:
    """peft's class of settings for a method."""

    def own(value: Any) -> Any:
        mutable = isinstance(value, dict | list)
        return field(default_factory=value.copy) if mutable else field(default=value)

    body = [(key, Any, own(value)) for key, value in {"peft_type": kind, **defaults}.items()]
    made = make_dataclass(name, body, bases=(PeftConfig,), namespace={"__module__": __name__})
    made.__doc__ = f"The settings of peft's {kind}."
    return PeftConfig.kinds.setdefault(kind, made)


LoraConfig: Any = _made("LoraConfig", "LORA", **_LORA)
AdaLoraConfig: Any = _made(
    "AdaLoraConfig", "ADALORA",
    **{**_LORA, "rank_pattern": None}, target_r=8, init_r=12, tinit=0, tfinal=0,
    deltaT=1, beta1=0.85, beta2=0.85, orth_reg_weight=0.5, total_step=None,
)  # fmt: skip
IA3Config: Any = _made(
    "IA3Config", "IA3",
    **_PLACES, feedforward_modules=None, fan_in_fan_out=False, init_ia3_weights=True,
)  # fmt: skip
LoHaConfig: Any = _made("LoHaConfig", "LOHA", **_HADAMARD)
LoKrConfig: Any = _made(
    "LoKrConfig", "LOKR",
    **_HADAMARD, decompose_both=False, decompose_factor=-1, rank_dropout_scale=False,
)  # fmt: skip
HiraConfig: Any = _made(
    "HiraConfig", "HIRA",
    **_TURNED, r=32, hira_dropout=0.0, init_weights=True, rank_pattern={},
)  # fmt: skip
OFTConfig: Any = _made(
    "OFTConfig", "OFT",
    **_BIASED, r=0, oft_block_size=32, module_dropout=0.0, init_weights=True,
    coft=False, eps=6e-5, block_share=False, use_cayley_neumann=True,
    num_cayley_neumann_terms=5,
)  # fmt: skip
BOFTConfig: Any = _made(
    "BOFTConfig", "BOFT",
    **_BIASED, boft_block_size=4, boft_block_num=0, boft_n_butterfly_factor=1,
    boft_dropout=0.0, init_weights=True,
)  # fmt: skip
HRAConfig: Any = _made(
    "HRAConfig", "HRA",
    **_LAYERS, r=8, apply_GS=False, init_weights=True, bias="none",
)  # fmt: skip
VeraConfig: Any = _made(
    "VeraConfig", "VERA",
    **{k: x for k, x in _BIASED.items() if k != "exclude_modules"}, r=256,
    projection_prng_key=0, save_projection=True, vera_dropout=0.0, d_initial=0.1,
    init_weights=True,
)  # fmt: skip
VBLoRAConfig: Any = _made(
    "VBLoRAConfig", "VBLORA",
    **_BIASED, r=4, num_vectors=256, vector_length=256, topk=2,
    save_only_topk_weights=False, vblora_dropout=0.0, init_vector_bank_bound=0.02,
    init_logits_std=0.1,
)  # fmt: skip
FourierFTConfig: Any = _made(
    "FourierFTConfig", "FOURIERFT",
    **_BIASED, n_frequency=1000, scaling=150.0, random_loc_seed=777,
    n_frequency_pattern={}, init_weights=False,
)  # fmt: skip
ShiraConfig: Any = _made(
    "ShiraConfig", "SHIRA",
    r=32, mask_type="random", random_seed=None, target_modules=None,
    fan_in_fan_out=False, init_weights=True, modules_to_save=None,
)  # fmt: skip
LNTuningConfig: Any = _made("LNTuningConfig", "LN_TUNING", **_PLACES)
TrainableTokensConfig: Any = _made(
    "TrainableTokensConfig", "TRAINABLE_TOKENS",
    token_indices=[], target_modules=None, init_weights=True,
)  # fmt: skip
PromptTuningConfig: Any = _made(
    "PromptTuningConfig", "PROMPT_TUNING",
    **_VIRTUAL, prompt_tuning_init="RANDOM", prompt_tuning_init_text=None,
    tokenizer_name_or_path=None, tokenizer_kwargs=None,
)  # fmt: skip
PromptEncoderConfig: Any = _made(
    "PromptEncoderConfig", "P_TUNING",
    **_VIRTUAL, encoder_reparameterization_type="MLP", encoder_hidden_size=None,
    encoder_num_layers=2, encoder_dropout=0.0,
)  # fmt: skip
PrefixTuningConfig: Any = _made(
    "PrefixTuningConfig", "PREFIX_TUNING",
    **_VIRTUAL, init_weights=None, encoder_hidden_size=None, prefix_projection=False,
)  # fmt: skip
