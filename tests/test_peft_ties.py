"""Tied embeddings in PEFT's directories: one change of the one weight, or the reason why not."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftlite as pl
from tests.test_peft_files import apart, disturb
from tests.zoo import KINDS, perturb, seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:.*tied"),
    pytest.mark.filterwarnings("ignore:.*weight.tying"),
]

IDS = torch.tensor([[1, 3, 5, 9, 3]])
SIZES: dict[str, Any] = dict(
    vocab_size=29, hidden_size=16, intermediate_size=20, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
)  # fmt: skip


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))


def gemma() -> nn.Module:
    """Whose embedding scales its rows."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, head_dim=4, layer_types=["full_attention"], sliding_window=8)
    )


def bart() -> nn.Module:
    """Whose embeddings scale their rows, and are three modules with one weight."""
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=29,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            scale_embedding=True,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=20,
            decoder_ffn_dim=20,
            max_position_embeddings=16,
        )
    )


def t5() -> nn.Module:
    """Whose embedding is one module with three names."""
    return next(kind for kind in KINDS if kind.name == "hf_t5").make()


def model_of(make: Any) -> nn.Module:
    with seeded():
        return perturb(make()).double().eval()


def run(model: nn.Module) -> Tensor:
    its = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **its).logits


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, **settings)


TOKENS = [3, 1]
ROWS = lora(target_modules=["q_proj", "q"], trainable_token_indices=TOKENS)
EQUAL = [
    pytest.param(make, config, id=f"{make.__name__}-{name}")
    for name, makes, config in (
        ("tokens", (llama, gemma, bart, t5), peft.TrainableTokensConfig(token_indices=TOKENS)),
        ("rows", (llama, gemma, bart, t5), ROWS),
        ("pair", (llama, gemma), lora(target_modules=["embed_tokens"], ensure_weight_tying=True)),
        ("ranks", (llama,), lora(
            target_modules=["q_proj", "lm_head"], ensure_weight_tying=True,
            rank_pattern={"q_proj": 3},
        )),
        ("whole", (llama,), lora(
            target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True,
        )),
    )
    for make in makes
]  # fmt: skip


def saved(make: Any, config: Any, folder: Path) -> Tensor:
    """What peft's model gives, all that it trains moved, once it is saved."""
    theirs = peft.get_peft_model(model_of(make), copy.deepcopy(config)).eval()
    disturb(theirs)
    theirs.save_pretrained(folder)
    return run(theirs)


@pytest.mark.parametrize("make, config", EQUAL)
@torch.no_grad()
def test_one_change_of_the_one_weight(make: Any, config: Any, tmp_path: Path) -> None:
    expected = saved(make, config, tmp_path / "sql")
    ours = model_of(make)
    assert apart(run(ours), expected) > 1e-3
    delta = pl.load(ours, tmp_path / "sql")
    assert apart(run(ours), expected) <= 1e-6
    pl.export(delta, tmp_path / "out")
    back = peft.PeftModel.from_pretrained(model_of(make), tmp_path / "out").eval()
    assert apart(run(back), expected) <= 1e-6
    pl.merge(ours, delta)
    assert apart(run(ours), expected) <= 1e-6


APART = [
    ("the head alone", llama, lora(target_modules=["lm_head"]), "lm_head"),
    ("the input alone", llama, lora(target_modules=["embed_tokens"]), "model.embed_tokens"),
    ("a head of its own", llama, lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
     "lm_head"),
    ("the head's tokens", llama, lora(
        target_modules=["q_proj"], trainable_token_indices={"lm_head": TOKENS},
    ), "lm_head"),
    ("other tokens", llama, lora(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1], "lm_head": [3]},
    ), "lm_head"),
]  # fmt: skip


@pytest.mark.parametrize(
    "make, config, path", [its[1:] for its in APART], ids=[a[0] for a in APART]
)
@torch.no_grad()
def test_what_is_apart_is_refused_and_the_advice_is_right(
    make: Any, config: Any, path: str, tmp_path: Path
) -> None:
    """As it says, the model is untied, and then merged, saved and loaded again by itself."""
    expected = saved(make, config, tmp_path / "sql")
    model = model_of(make)
    with pytest.raises(pl.FileError, match="this model ties them: untie") as caught:
        pl.load(model, tmp_path / "sql")
    assert f"model.{path}.weight = torch.nn.Parameter(model.{path}.weight" in str(caught.value)
    assert "model.config.tie_word_embeddings = False" in str(caught.value)
    module = model.get_submodule(path)
    module.weight = nn.Parameter(module.weight.detach().clone())
    model.config.tie_word_embeddings = False
    pl.load(model, tmp_path / "sql")
    assert apart(run(model), expected) <= 1e-6
    pl.merge(model, "sql", backup="none")
    model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float64)
    assert apart(run(again), expected) <= 1e-6


@torch.no_grad()
def test_a_module_with_two_names_is_changed_by_peft_under_one(tmp_path: Path) -> None:
    saved(t5, lora(target_modules=["shared"]), tmp_path / "sql")
    # transformers 5 has a module for each name, with one weight
    said = "the same module under another name: give each its own|this model ties them: untie them"
    with pytest.raises(pl.FileError, match=said):
        pl.load(model_of(t5), tmp_path / "sql")


@torch.no_grad()
def test_a_bias_that_peft_leaves_out_is_no_loss(tmp_path: Path) -> None:
    """peft's tokens of a tied weight take the bias away from the head that has one."""
    from transformers import BertConfig, BertForMaskedLM

    def bert() -> nn.Module:
        return BertForMaskedLM(BertConfig(**SIZES))

    expected = saved(bert, peft.TrainableTokensConfig(token_indices=TOKENS), tmp_path / "sql")
    model = model_of(bert)
    with pytest.raises(pl.FileError, match="a Linear with a bias, which peft leaves out"):
        pl.load(model, tmp_path / "sql")
    config = pl.FullTuning(targets="word_embeddings.weight[3:5]")
    with pytest.raises(pl.PeftliteError, match="peft leaves out the bias"):
        pl.export(pl.attach(model, config), tmp_path / "out")
    assert apart(expected, run(model)) > 0.1
