"""AdapterHub's folders: what real adapters save gives, by pl.load alone, what their model gives."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import peftlite as pl
from tests.test_against_adapters import KIND
from tests.zoo import CLASSES, HIDDEN, TOKENS, VOCAB, WIDTH, Kind, seeded

# isort: split
import adapters  # only once the file above has seen whether it is there
from adapters import (
    BnConfig,
    DiReftConfig,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    NoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
)


def roberta() -> nn.Module:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "max_position_embeddings": TOKENS + 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_labels": CLASSES,
    }
    return RobertaForSequenceClassification(RobertaConfig(**sizes))


# its own T5
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning")


def bart() -> nn.Module:
    sizes: dict[str, Any] = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), HIDDEN)
    sizes |= {"vocab_size": VOCAB, "d_model": WIDTH, "max_position_embeddings": 2 * TOKENS}
    return BartForConditionalGeneration(BartConfig(**sizes))


KIND["hf_bart"] = replace(KIND["hf_t5"], name="hf_bart", make=bart)
KIND["hf_roberta"] = replace(KIND["hf_bert"], name="hf_roberta", make=roberta)
ALL = ("hf_bert", "hf_roberta", "hf_distilbert", "hf_gpt2", "hf_llama", "hf_t5")


@dataclass(frozen=True)
class Row:
    name: str
    theirs: adapters.AdapterConfig
    kinds: tuple[str, ...] = ALL


ROWS = (
    Row(
        "lora",
        LoRAConfig(r=2, alpha=6, intermediate_lora=True, output_lora=True),
        (*ALL, "hf_bart"),
    ),
    Row("lora_k", LoRAConfig(r=2, alpha=6, attn_matrices=["k"]), ("hf_bert", "hf_gpt2")),
    Row("lora_qkv", LoRAConfig(r=2, attn_matrices=["v", "q", "k"]), ("hf_gpt2", "hf_t5")),
    Row("ia3", IA3Config(), ("hf_bert", "hf_gpt2", "hf_t5")),
    Row("ia3_qkv", IA3Config(alpha=2, attn_matrices=["q", "k", "v"]), ("hf_gpt2", "hf_t5")),
    Row("houlsby", DoubleSeqBnConfig(reduction_factor=4)),
    Row("pfeiffer", SeqBnConfig(reduction_factor=4)),
    Row("parallel", ParBnConfig(reduction_factor=4), ("hf_distilbert",)),
    Row(
        "by_layer",
        BnConfig(True, True, {"0": 2, "default": 8}, "tanh", scaling=2.5),
        ("hf_bert", "hf_gpt2", "hf_t5"),
    ),
    Row(
        "norm_first",
        BnConfig(False, True, 4, "gelu", True, False, residual_before_ln=False),
        ("hf_bert", "hf_distilbert", "hf_gpt2", "hf_llama"),
    ),
    Row(
        "prefix",
        PrefixTuningConfig(prefix_length=3, bottleneck_size=5),
        ("hf_bert", "hf_roberta", "hf_gpt2", "hf_gptj", "hf_llama", "hf_vit", "hf_bart"),
    ),
    Row(
        "prefix_flat",
        PrefixTuningConfig(prefix_length=3, flat=True, leave_out=[1]),
        ("hf_bert", "hf_gpt2", "hf_bart"),
    ),
)


def saved(
    kind: Kind,
    config: Any,
    folder: Path,
    change: Callable[[Any], Any] = lambda _: None,
    safe: bool = False,
) -> Any:
    """A folder that adapters wrote, and what its model gives."""
    theirs: Any = kind.model()
    batch = kind.batch()
    base, configs = kind.run(theirs, batch), type(theirs.config)
    theirs.set_attn_implementation("eager")
    with mock.patch.object(configs, "attribute_map", configs.attribute_map), torch.no_grad():
        adapters.init(theirs)
        theirs.add_adapter("a", config, set_active=True)
        with seeded(3):
            for name, parameter in theirs.named_parameters():
                if ".a." in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        change(theirs)
        theirs.save_adapter(str(folder), "a", use_safetensors=safe)
        return kind.run(theirs.eval(), batch), base


@pytest.mark.parametrize(
    "row, kind",
    [pytest.param(row, KIND[kind], id=f"{row.name}-{kind}") for row in ROWS for kind in row.kinds],
)
@torch.no_grad()
def test_a_folder_gives_what_adapters_gives(row: Row, kind: Kind, tmp_path: Path) -> None:
    expected, base = saved(kind, row.theirs, tmp_path)
    ours = kind.model()
    pl.load(ours, tmp_path)
    output = kind.run(ours, kind.batch())
    assert (output - expected).abs().max() <= 1e-5 < (expected - base).abs().max()
    assert pl.inspect(tmp_path).format == "adapterhub"


# -- ReFT

REFT = (
    LoReftConfig(r=2),
    LoReftConfig(r=3, prefix_positions=0, suffix_positions=2, layers=[0]),
    NoReftConfig(r=2, prefix_positions=2, suffix_positions=1, tied_weights=True),
    DiReftConfig(r=2),
)


def masked(kind: Kind) -> Kind:
    """A kind with rows that are padded, on the left in one and on the right in the other."""

    def inputs(b: int) -> dict[str, Tensor]:
        batch = kind.inputs(b)
        mask = torch.ones_like(batch["input_ids"])
        mask[0, :2], mask[1, -1] = 0, 0
        return {**batch, "attention_mask": mask}

    return replace(kind, inputs=inputs)


def spread(model: Any) -> None:
    """Turns R away from nothing, which it is once training has changed its diagonal of −1."""
    for name, parameter in model.named_parameters():
        if name.endswith("weight.original"):
            parameter.sub_(torch.eye(*parameter.shape))


def told(folder: Path, config: Any) -> None:
    """Says in a folder which of two it is."""
    file = folder / "adapter_config.json"
    said = json.loads(file.read_text())
    said["config"]["subtract_projection"] = config.subtract_projection
    file.write_text(json.dumps(said))


@pytest.mark.parametrize("config", REFT, ids=lambda config: f"{type(config).__name__}{config.r}")
@pytest.mark.parametrize(
    "kind",
    [*(masked(KIND[n]) for n in ALL if n != "hf_t5"), KIND["hf_gptj"], KIND["hf_vit"]],
    ids=lambda kind: kind.name,
)
@torch.no_grad()
def test_reft_changes_what_adapters_changes(kind: Kind, config: Any, tmp_path: Path) -> None:
    expected, base = saved(kind, config, tmp_path, spread)
    told(tmp_path, config)
    ours: Any = kind.model()
    ours.set_attn_implementation("eager")  # as theirs: what a padding gives is another in each
    pl.load(ours, tmp_path)
    output = kind.run(ours, kind.batch())
    assert (output - expected).abs().max() <= 1e-5 < (expected - base).abs().max()


@torch.no_grad()
def test_reft_goes_on_in_a_cache_as_adapters_does(tmp_path: Path) -> None:
    kind, theirs = KIND["hf_llama"], []
    saved(kind, LoReftConfig(r=2), tmp_path, lambda model: (spread(model), theirs.append(model)))
    pl.load(ours := kind.model(), tmp_path)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    ids = torch.randint(3, VOCAB, (2, 4))
    found, expected = (m.generate(ids, **options).logits for m in (ours, theirs[0].eval()))
    assert (torch.stack(found) - torch.stack(expected)).abs().max() <= 1e-5


# -- heads


@pytest.mark.parametrize("name", ["hf_bert", "hf_gpt2"])
@pytest.mark.parametrize("safe", [False, True], ids=["pickle", "safetensors"])
@torch.no_grad()
def test_the_head_of_a_class_of_transformers_is_part_of_it(
    name: str, safe: bool, tmp_path: Path
) -> None:
    """GPT-2's is tied to the embedding, which so changes with it in adapters, too."""
    kind = KIND[name]

    trained = name == "hf_bert" or not safe  # where it isn't, nothing of it is kept

    def train(model: Any) -> None:
        head = model.classifier if name == "hf_bert" else model.lm_head
        head.weight.add_(0.3 * trained * torch.randn_like(head.weight))

    expected, _ = saved(kind, LoRAConfig(r=2), tmp_path, train, safe)
    ours = kind.model()
    delta = pl.load(ours, tmp_path)
    assert (kind.run(ours, kind.batch()) - expected).abs().max() <= 1e-5
    full = [type(placed.method).__name__ for placed in delta.placed.values()].count("FullTuning")
    assert full == trained


@torch.no_grad()
def test_a_head_of_another_class_is_refused_but_by_a_bare_model(tmp_path: Path) -> None:
    kind = KIND["hf_bert"]
    theirs = adapters.BertAdapterModel(kind.model().config)
    theirs.add_adapter("a", LoRAConfig(r=2, init_weights="bert"), set_active=True)
    theirs.add_classification_head("a")
    theirs.save_adapter(str(tmp_path), "a")
    with pytest.raises(pl.FileError, match="is the head of a BertAdapterModel"):
        pl.load(kind.model(), tmp_path)
    bare = BertModel(kind.model().config).eval()
    own = {k: v for k, v in theirs.bert.state_dict().items() if k in bare.state_dict()}
    bare.load_state_dict(own)
    pl.load(bare, tmp_path)  # where nothing is called bert.…
    expected = theirs.eval().bert(**kind.batch())[0]
    assert (bare(**kind.batch())[0] - expected).abs().max() <= 1e-5


# -- older folders


@pytest.mark.parametrize(
    "version, config, old",
    [
        ("adapters.1.0.1", LoRAConfig(r=2, alpha=8), {}),  # which had α = r
        ("3.2.1", LoRAConfig(r=2, alpha=8), {}),
        (None, SeqBnConfig(non_linearity="gelu"), {"non_linearity": "gelu_orig"}),
    ],
)
@torch.no_grad()
def test_older_folders_are_read_as_adapters_reads_them(
    version: str | None, config: Any, old: dict[str, str], tmp_path: Path
) -> None:
    kind = KIND["hf_bert"]
    saved(kind, config, tmp_path)
    file = tmp_path / "adapter_config.json"
    said = json.loads(file.read_text())
    said |= {"version": version, "config": said["config"] | old}
    file.write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    tensors = torch.load(tmp_path / "pytorch_adapter.bin", weights_only=True)
    named = {k.replace(".adapters.", ".layer_text_task_adapters."): v for k, v in tensors.items()}
    torch.save(named, tmp_path / "pytorch_adapter.bin")
    ours = kind.model()
    theirs: Any = kind.model()
    adapters.init(theirs)
    theirs.load_adapter(str(tmp_path), set_active=True)
    pl.load(ours, tmp_path)
    expected = kind.run(theirs.eval(), kind.batch())
    assert (kind.run(ours, kind.batch()) - expected).abs().max() <= 1e-5
