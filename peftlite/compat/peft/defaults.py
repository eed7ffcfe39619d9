"""Defaults: which modules PEFT takes of a model of transformers where no setting says, by its type.

A table has a line for models with the same targets; what a method has otherwise than LoRA is in a
table of its own, `-` where it takes none.
"""

from __future__ import annotations

from typing import Any

from peftlite.errors import PeftliteError

_LORA = r"""
t5 mt5: q v
bart opt gptj gpt_neo llama llama4 mistral mixtral: q_proj v_proj
stablelm gemma gemma2 gemma3_text qwen2 qwen3: q_proj v_proj
gpt2 gpt_bigcode: c_attn
bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon: query_key_value
blip-2: q v q_proj v_proj
bert roberta xlm-roberta electra layoutlm: query value
deberta-v2: query_proj value_proj
deberta: in_proj
mpt: Wqkv
btlm: c_proj c_attn
codegen: qkv_proj
phi: q_proj v_proj fc1 fc2
gemma4: .*language_model\..*\.(q_proj|v_proj)
nemotron_h: q_proj k_proj v_proj o_proj
rwkv: key value receptance output
rwkv7: r_proj k_proj v_proj o_proj key value
"""
_MORE = """
t5: q k v o wi wo
mt5: q k v o wi_0 wi_1 wo
bart opt: q_proj k_proj v_proj out_proj fc1 fc2
deberta-v2: query_proj key_proj value_proj dense
blip-2 xlm-roberta electra layoutlm chatglm mpt RefinedWebModel RefinedWeb falcon btlm: -
codegen mistral mixtral stablelm phi rwkv rwkv7: -
"""
_IA3 = """
t5: k v wo
mt5: k v wi_1
gpt2 gpt_bigcode: c_attn mlp.c_proj
bloom: query_key_value mlp.dense_4h_to_h
roberta bert: key value output.dense
opt: q_proj k_proj fc2
gptj: q_proj v_proj fc_out
gpt_neox RefinedWebModel RefinedWeb falcon: query_key_value dense_4h_to_h
gpt_neo: q_proj v_proj c_proj
bart phi: q_proj v_proj fc2
llama mistral: k_proj v_proj down_proj
llama4 gemma gemma2 gemma3_text qwen2 qwen3: q_proj v_proj down_proj
mixtral: k_proj v_proj w2
deberta-v2: key_proj value_proj output.dense
deberta: in_proj output.dense
"""
_NORMS = """
llama mistral gemma: input_layernorm post_attention_layernorm norm
bloom falcon: input_layernorm post_attention_layernorm ln_f
llava: multi_modal_projector input_layernorm post_attention_layernorm norm embed_tokens lm_head
t5 mt5: layer_norm final_layer_norm
bart: self_attn_layer_norm encoder_attn_layer_norm final_layer_norm
gpt2: ln_1 ln_2 ln_f
blip-2: layernorm LayerNorm final_layer_norm self_attn_layer_norm
gptj: ln_1 ln_f
phi: input_layernorm final_layernorm
gemma2 gemma3_text: input_layernorm post_attention_layernorm pre_feedforward_layernorm \
post_feedforward_layernorm norm
qwen2 qwen3: post_attention_layernorm
"""
_OTHERWISE = {
    "ADALORA": _MORE + "roberta: query key value dense",
    "VBLORA": _MORE,
    "FOURIERFT": "gpt2 gpt_bigcode: mlp.c_proj",
    "SHIRA": "phi: q_proj v_proj",
    "VERA": "phi: q_proj v_proj",
}


def _read(table: str) -> dict[str, Any]:
    lines = (line.partition(": ") for line in table.strip().splitlines())
    return {kind: _targets(names) for kinds, _, names in lines for kind in kinds.split()}


def _targets(names: str) -> list[str] | str:
    """Names of modules, or the regex that they are."""
    return names if "*" in names else names.removeprefix("-").split()


def defaults(kind: str) -> dict[str, Any]:
    """The targets that a method of peft's takes, by a model's `model_type`."""
    alone = {"IA3": _IA3, "LN_TUNING": _NORMS}.get(kind)
    found = _read(alone) if alone else {**_read(_LORA), **_read(_OTHERWISE.get(kind, ""))}
    return {model: targets for model, targets in found.items() if targets}


def default_of(kind: str, model: Any) -> Any:
    """The targets that a method of peft's takes of a model. Raises PeftliteError."""
    its = getattr(getattr(model, "config", None), "model_type", None)
    known = defaults(kind)
    if its not in known:
        raise PeftliteError(
            f"peft has no default target_modules of its {kind} for a "
            f"{its or type(model).__name__}: say target_modules=, such as 'all-linear'"
        )
    return known[its]


def feedforward_of(model: Any) -> list[str]:
    """Those of IA3's default targets whose inputs peft scales."""
    return [] if model.config.model_type == "mt5" else default_of("IA3", model)[-1:]
