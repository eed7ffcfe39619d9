"""PEFT's names: a script of peft's runs with `from peftlite.compat.peft import …` in its place.

What a setting means is what peft 0.21.2 means by it; docs/coming_from_peft.md goes through them.
"""

from peftlite.compat.peft.configs import (
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ShiraConfig,
    TaskType,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
)
from peftlite.compat.peft.model import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
    inject_adapter_in_model,
)
from peftlite.compat.peft.state import (
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)

PeftMixedModel = PeftModel

__all__ = [
    "AdaLoraConfig", "AutoPeftModel", "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction", "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification", "BOFTConfig", "FourierFTConfig", "HRAConfig",
    "HiraConfig", "IA3Config", "LNTuningConfig", "LoHaConfig", "LoKrConfig", "LoraConfig",
    "OFTConfig", "PeftConfig", "PeftMixedModel", "PeftModel", "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering", "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification", "PeftModelForTokenClassification", "PeftType",
    "PrefixTuningConfig", "PromptEncoderConfig", "PromptTuningConfig", "ShiraConfig",
    "TaskType", "TrainableTokensConfig", "VBLoRAConfig", "VeraConfig", "get_peft_model",
    "get_peft_model_state_dict", "inject_adapter_in_model", "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]  # fmt: skip
