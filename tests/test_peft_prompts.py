"""Prompts and prefixes of real peft: what it saves gives its outputs here after pl.load alone."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import peftlite as pl
from tests.zoo import perturb, seeded

# peft 0.21 hands its prefixes to transformers 5 by the older name
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")

N = 3
IDS = torch.tensor([[5, 7, 11, 3, 9, 2], [3, 4, 15, 9, 1, 1]])
MASK = (IDS != 1).long()  # 1 is padding
SIZES = {
    "vocab_size": 29, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 1,
}  # fmt: skip
GPT2 = {
    "vocab_size": 29, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "pad_token_id": 1
}  # fmt: skip


def made(name: str, **config: Any) -> nn.Module:
    """A model of transformers by the name of its class, the same on every call."""
    kind = getattr(transformers, name)
    with seeded():
        return perturb(kind(kind.config_class(**config))).eval()


@torch.no_grad()
def adapted(base: nn.Module, config: Any, path: Path) -> Any:
    """A model of peft's, its values drawn, saved in a folder."""
    theirs: Any = peft.get_peft_model(base, config).eval()
    with seeded(3):
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    theirs.save_pretrained(path)
    return theirs


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# -- prompts of classifiers: whatever their heads read

CLASSIFIERS = {
    "Roberta": SIZES,
    "XLMRoberta": SIZES,
    "Electra": {**SIZES, "embedding_size": 16},
    "BigBird": {**SIZES, "attention_type": "original_full"},
    "Esm": {**SIZES, "mask_token_id": 2},  # counts masked ids, if it gets ids
    "GPT2": GPT2,  # peft takes the last position of a padded row
}


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
@torch.no_grad()
def test_classifiers_read_the_virtual_tokens_that_pefts_read(
    name: str, kind: Any, tmp_path: Path
) -> None:
    model, base = (made(f"{name}ForSequenceClassification", **CLASSIFIERS[name]) for _ in range(2))
    theirs = adapted(base, kind(task_type="SEQ_CLS", num_virtual_tokens=N), tmp_path / "sql")
    pl.load(model, tmp_path / "sql")
    for mask in (MASK, None):
        close(
            model(IDS, attention_mask=mask).logits,
            theirs(input_ids=IDS, attention_mask=mask).logits,
        )
    labels = torch.tensor([0, 1])
    close(model(IDS, labels=labels).loss, theirs(input_ids=IDS, labels=labels).loss)


@torch.no_grad()
def test_a_prompt_that_a_classifier_reads_goes_back(tmp_path: Path) -> None:
    """As it's attached for peft; a default one on a decoder, whose head reads the last, as well."""
    virtual = pl.PromptTuning(prompt_length=N, targets="()", cut=False)
    for name, config, head, method in (
        ("BertForSequenceClassification", SIZES, "classifier", virtual),
        ("GPT2ForSequenceClassification", GPT2, "score", pl.PromptTuning(prompt_length=N)),
    ):
        model = made(name, **config)
        delta = pl.attach(model, [method, pl.FullTuning(targets=head)])
        pl.export(delta, tmp_path / name, settings={"task_type": "SEQ_CLS"})
        theirs: Any = peft.PeftModel.from_pretrained(made(name, **config), tmp_path / name)
        close(model(IDS[:1]).logits, theirs.eval()(input_ids=IDS[:1]).logits)


@pytest.mark.parametrize("name", ["Bert", "GPT2"])
@torch.no_grad()
def test_prompts_before_a_classifier_of_tokens(name: str, tmp_path: Path) -> None:
    """It calls its model with ids and with inputs_embeds=None."""
    config = GPT2 if name == "GPT2" else SIZES
    model, base = (made(f"{name}ForTokenClassification", **config) for _ in range(2))
    how = peft.PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=N)
    theirs = adapted(base, how, tmp_path / "sql")
    pl.load(model, tmp_path / "sql")
    close(
        model(IDS, attention_mask=MASK).logits,
        theirs(input_ids=IDS, attention_mask=MASK).logits[:, N:],
    )


# -- prefixes: in the cache of whatever model, with its own positions, biases and windows

GPTJ = {**GPT2, "rotary_dim": 4, "bos_token_id": 2, "eos_token_id": None}
OPT = {
    "vocab_size": 29, "hidden_size": 16, "ffn_dim": 20, "num_hidden_layers": 2, "pad_token_id": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32, "word_embed_proj_dim": 16,
}  # fmt: skip
WINDOW = {
    **SIZES, "num_key_value_heads": 1, "head_dim": 4, "sliding_window": 5, "eos_token_id": None
}  # fmt: skip
T5 = {
    "vocab_size": 29, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_heads": 2, "num_layers": 3,
    "decoder_start_token_id": 0, "pad_token_id": 1, "eos_token_id": None,
}  # fmt: skip
BART = {
    "vocab_size": 29, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "pad_token_id": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20, "max_position_embeddings": 32, "decoder_start_token_id": 0,
    "forced_eos_token_id": None, "eos_token_id": None,
}  # fmt: skip
PREFIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("CAUSAL_LM", {**GPT2, "eos_token_id": None}),
    "OPTForCausalLM": ("CAUSAL_LM", OPT),  # counts its mask
    "GPTJForCausalLM": ("CAUSAL_LM", GPTJ),  # attends by hand, as do T5 and Bloom
    "BloomForCausalLM": (
        "CAUSAL_LM",
        {"vocab_size": 29, "hidden_size": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 1},
    ),
    "LlamaForCausalLM": ("CAUSAL_LM", {**SIZES, "eos_token_id": None}),
    "Gemma3ForCausalLM": (
        "CAUSAL_LM",
        {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "BertForTokenClassification": ("TOKEN_CLS", SIZES),
    "RobertaForTokenClassification": ("TOKEN_CLS", SIZES),
    "T5ForConditionalGeneration": ("SEQ_2_SEQ_LM", T5),
    "BartForConditionalGeneration": ("SEQ_2_SEQ_LM", BART),
}


def given(task: str, mask: Tensor | None) -> dict[str, Any]:
    """What a model is called with."""
    more = {"decoder_input_ids": IDS[:, :4]} if task == "SEQ_2_SEQ_LM" else {}
    return {"input_ids": IDS, "attention_mask": mask, **more}


# in classifiers of transformers 5.24 peft 0.21 doesn't find where a prefix goes, and says so
OLD = transformers.__version__.startswith("4.")


@pytest.mark.parametrize(
    "name", [n for n, (task, _) in PREFIXED.items() if OLD or task != "TOKEN_CLS"]
)
@torch.no_grad()
def test_prefixes_both_ways(name: str, tmp_path: Path) -> None:
    task, config = PREFIXED[name]
    model, base = (made(name, **config) for _ in range(2))
    plain = copy.deepcopy(base)
    how = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=N)
    theirs = adapted(base, how, tmp_path / "sql")
    delta = pl.load(model, tmp_path / "sql")
    (method,) = (m for m in delta.methods if isinstance(m, pl.PrefixTuning))
    assert method.positions == "shifted"
    pl.export(delta, tmp_path / "out", settings={"task_type": task})
    back: Any = peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    left = MASK.flip(1)
    for mask in (None, MASK, left):
        x = given(task, mask)
        seen = slice(None) if mask is None or "decoder_input_ids" in x else mask.bool()
        expected = theirs(**x).logits[seen]
        close(model(**x).logits[seen], expected)
        close(back(**x).logits[seen], expected)
    # transformers 5.24 ignores the prefix that peft 0.21 hands to generate
    if task == "CAUSAL_LM" and OLD:
        for mask in (torch.ones_like(IDS), left):
            x = {"input_ids": IDS, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
            assert torch.equal(model.generate(**x), theirs.generate(**x))


@torch.no_grad()
def test_layers_of_a_decoder_that_are_trained_here_go_to_peft(tmp_path: Path) -> None:
    """peft has one prefix for layers 0 and 2 of four: those that it has to spare are left out."""
    model, base = (made("T5ForConditionalGeneration", **{**T5, "num_layers": 4}) for _ in range(2))
    delta = pl.attach(model, pl.PrefixTuning(prefix_length=N, positions="shifted"))
    pl.export(delta, tmp_path / "sql", settings={"task_type": "SEQ_2_SEQ_LM"})
    theirs: Any = peft.PeftModel.from_pretrained(base, tmp_path / "sql").eval()
    x = given("SEQ_2_SEQ_LM", None)
    close(model(**x).logits, theirs(**x).logits)
