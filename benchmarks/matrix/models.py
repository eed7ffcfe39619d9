"""Models: the kinds in peft's own tests, and tiny decoders, encoder-decoders, classifiers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.zoo import perturb, seeded

VOCAB, WIDTH, HIDDEN, TOKENS = 32, 16, 24, 6


@dataclass(frozen=True)
class Model:
    """A model: how to make and feed it, and what peft's settings can name in it.

    Args:
        family: peft's tests that it is of.
        targets: what most methods change there; further choices of targets.
        task: peft's task_type, where it has one.
        head: the module that is trained whole.
        path: the whole path of one of its targets.
        parameters: of those that peft takes by name.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    targets: tuple[Any, ...]
    task: str | None = None
    head: str | None = None
    path: str | None = None
    embedding: str | None = None
    norm: str | None = None
    blocks: str | None = None
    parameters: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)

    def fresh(self) -> nn.Module:
        """The same weights on every call, in fp64 and eval."""
        return copy.deepcopy(_made(self.name))

    @torch.no_grad()
    def run(self, model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
        given = self.inputs()
        output = model(**{k: x.to(dtype) if x.is_floating_point() else x for k, x in given.items()})
        return getattr(output, "logits", output)


@functools.cache
def _made(name: str) -> nn.Module:
    with seeded():
        return perturb(MODELS[name].make()).double().eval()


# -- peft's own


class MLP(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.lin1 = nn.Linear(20, 8, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.lin0(x).relu()).log_softmax(-1)


class Deep(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList([make() for _ in range(3)])
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(WIDTH, HIDDEN)
        self.lin1 = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.lin0(x).relu())


class Normed(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.norm0, self.lin0 = norm(10), nn.Linear(10, 20)
        self.norm1, self.lin1 = norm(20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.norm1(self.lin0(self.norm0(x)).relu()))


class EmbConv1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 5)
        self.conv1d = Conv1D(4, 5)
        self.lin0 = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.conv1d(self.emb(x)).relu().flatten(1))


class Conv(nn.Module):
    """One convolution and a linear map of what it gives."""

    def __init__(self, conv: nn.Module, features: int):
        super().__init__()
        self.conv, self.lin0 = conv, nn.Linear(features, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.conv(x).relu().flatten(1))


class EmbConv(nn.Module):
    """An embedding before a convolution over its tokens."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 4)
        self.conv = nn.Conv1d(4, 6, 2)
        self.lin0 = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.conv(self.emb(x).mT).relu().flatten(1))


class Attention(nn.Module):
    def __init__(self, **settings: Any):
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **settings)
        self.lin0 = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.mha(x, x, x)[0])


class Parameters(nn.Module):
    """A linear map as a bare parameter, and experts as another of three dimensions."""

    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(10, WIDTH)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.lin0(x).relu())


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.up = nn.Parameter(torch.randn(3, WIDTH, 12))
        self.down = nn.Parameter(torch.randn(3, 12, WIDTH))
        self.flat = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bi,eio->beo", x, self.up).relu()
        y = torch.einsum("beo,eoi->bei", y, self.down)
        return (self.gate(x).softmax(-1)[..., None] * y).sum(1) @ self.flat


def floats(*shape: int) -> Callable[[], dict[str, Tensor]]:
    def make() -> dict[str, Tensor]:
        with seeded(1):
            return {"x": torch.randn(3, *shape, dtype=torch.float64)}

    return make


def ids(top: int, *shape: int, name: str = "x") -> Callable[[], dict[str, Tensor]]:
    def make() -> dict[str, Tensor]:
        with seeded(1):
            return {name: torch.randint(top, (3, *shape))}

    return make


def custom(
    name: str,
    make: Callable[[], nn.Module],
    inputs: Callable[[], dict[str, Tensor]],
    *targets: Any,
    **more: Any,
) -> Model:
    return Model(name, "custom", make, inputs, targets, **more)


def conv(name: str, module: Callable[[], nn.Module], features: int, *shape: int) -> Model:
    make = functools.partial(_conv, module, features)
    return custom(name, make, floats(*shape), ["conv"], ["conv", "lin0"], head="lin0", path="conv")


def _conv(module: Callable[[], nn.Module], features: int) -> nn.Module:
    return Conv(module(), features)


def _of(kind: Callable[..., nn.Module], *sizes: Any, **how: Any) -> Callable[[], nn.Module]:
    return functools.partial(kind, *sizes, **how)


CUSTOM = (
    custom("MLP", MLP, floats(10), ["lin0"], ["lin0", "lin1"], ["lin1"], "lin0", head="lin1",
           path="lin0"),
    custom("MLP without biases", _of(MLP, bias=False), floats(10), ["lin0"], head="lin1",
           path="lin0"),
    custom("DeepMLP", _of(Deep, Block), floats(WIDTH), ["lin0"], ["lin0", "lin1"],
           r".*layers\.[02]\.lin1", head="head", path="layers.1.lin0", blocks="layers"),
    custom("LayerNorm", _of(Normed, nn.LayerNorm), floats(10), ["lin0"], ["norm0", "lin0"],
           head="norm1", path="lin0", norm="norm0"),
    custom("BatchNorm", _of(Normed, nn.BatchNorm1d), floats(10), ["lin0"], ["norm0", "lin0"],
           head="norm1", path="lin0", norm="norm0"),
    custom("EmbConv1D", EmbConv1D, ids(20, 3), ["conv1d"], ["emb"], ["emb", "conv1d"],
           head="lin0", path="conv1d", embedding="emb", more={"fan_in_fan_out": True}),
    custom("EmbConv", EmbConv, ids(20, 3), ["conv"], ["emb"], ["emb", "conv", "lin0"],
           head="lin0", path="conv", embedding="emb"),
    conv("Conv1d", _of(nn.Conv1d, 4, 6, 3), 30, 4, 7),
    conv("Conv1d of one tap", _of(nn.Conv1d, 4, 6, 1), 42, 4, 7),
    conv("Conv1d, strided", _of(nn.Conv1d, 4, 6, 3, stride=2, padding=1, bias=False), 24, 4, 7),
    conv("Conv1d, grouped", _of(nn.Conv1d, 4, 8, 3, groups=2), 40, 4, 7),
    conv("Conv2d", _of(nn.Conv2d, 4, 8, 3), 72, 4, 5, 5),
    conv("Conv2d of one tap", _of(nn.Conv2d, 4, 8, 1), 200, 4, 5, 5),
    conv("Conv2d, dilated", _of(nn.Conv2d, 4, 8, (3, 2), dilation=2, padding=1), 120, 4, 5, 5),
    conv("Conv2d, same", _of(nn.Conv2d, 4, 8, 3, padding="same"), 200, 4, 5, 5),
    conv("Conv2d, reflecting",
         _of(nn.Conv2d, 4, 8, 3, padding=1, padding_mode="reflect"), 200, 4, 5, 5),
    conv("Conv2d, grouped", _of(nn.Conv2d, 4, 8, 3, groups=2), 72, 4, 5, 5),
    conv("Conv2d, depthwise", _of(nn.Conv2d, 8, 8, 3, groups=8), 72, 8, 5, 5),
    conv("Conv3d", _of(nn.Conv3d, 2, 4, 2), 108, 2, 4, 4, 4),
    custom("MHA", Attention, floats(5, WIDTH), ["mha"], ["mha", "lin0"], ["lin0"], head="lin0",
           path="mha"),
    custom("MHA without biases", _of(Attention, bias=False), floats(5, WIDTH), ["mha"],
           head="lin0", path="mha"),
    custom("Parameters", Parameters, floats(10), ["lin0"], head="lin0", path="lin0",
           parameters=("experts.up", "experts.down", "experts.flat", "lin0.weight")),
)  # fmt: skip


# -- transformers


def tokens(decoder: bool = False) -> dict[str, Tensor]:
    """Rows of tokens, one of them padded on the right."""
    with seeded(1):
        found = {"input_ids": torch.randint(2, VOCAB, (3, TOKENS))}
        if decoder:
            found["decoder_input_ids"] = torch.randint(2, VOCAB, (3, 4))
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    mask[1, -2:] = 0
    return {**found, "attention_mask": mask}


SIZES = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_labels": 5,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 24,
    "pad_token_id": 0, "use_cache": False,
}  # fmt: skip
GPT = {
    "vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_inner": HIDDEN,
    "n_positions": 24, "use_cache": False, "num_labels": 5, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
TASKS = {
    "CausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM",
    "ConditionalGeneration": "SEQ_2_SEQ_LM", "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
}  # fmt: skip
FAMILIES = {"CAUSAL_LM": "decoder", "SEQ_2_SEQ_LM": "encoder-decoder"}


def _real(config: str, kind: str, settings: Mapping[str, Any]) -> nn.Module:
    its = getattr(transformers, config)(**settings)
    return getattr(transformers, kind)(its)


def real(
    name: str, config: str, kind: str, settings: Mapping[str, Any], targets: list[str], **more: Any
) -> Model:
    """A model of transformers; peft's own choice of targets is None, and all linear maps a word."""
    task = next(task for end, task in TASKS.items() if kind.endswith(end))
    family = FAMILIES.get(task, "classifier")
    return Model(
        name, family, functools.partial(_real, config, kind, settings),
        functools.partial(tokens, task == "SEQ_2_SEQ_LM"), (targets, None, "all-linear"),
        task=task, **more,
    )  # fmt: skip


LLAMA = {"head": "lm_head", "embedding": "embed_tokens", "norm": "input_layernorm",
         "blocks": "layers", "path": "model.layers.1.self_attn.q_proj"}  # fmt: skip
GPT2 = {"embedding": "wte", "norm": "ln_1", "blocks": "h", "path": "transformer.h.1.attn.c_attn",
        "more": {"fan_in_fan_out": True}}  # fmt: skip
BERT = {"embedding": "word_embeddings", "norm": "LayerNorm", "blocks": "layer"}
QV = ["q_proj", "v_proj"]
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}

REAL = (
    real("GPT-2", "GPT2Config", "GPT2LMHeadModel", GPT, ["c_attn", "c_proj"], head="lm_head",
         **GPT2),
    real("OPT", "OPTConfig", "OPTForCausalLM",
         {**SIZES, "ffn_dim": HIDDEN, "word_embed_proj_dim": WIDTH, "dropout": 0.0}, QV,
         **{**LLAMA, "norm": "self_attn_layer_norm",
            "path": "model.decoder.layers.1.self_attn.q_proj"}),
    real("Llama", "LlamaConfig", "LlamaForCausalLM", GROUPED, QV, **LLAMA),
    real("Llama, tied", "LlamaConfig", "LlamaForCausalLM",
         {**GROUPED, "tie_word_embeddings": True}, QV, **LLAMA),
    real("Gemma 3", "Gemma3TextConfig", "Gemma3ForCausalLM",
         {**GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
          "query_pre_attn_scalar": 8}, QV, **LLAMA),
    real("GPT-J", "GPTJConfig", "GPTJForCausalLM", {**GPT, "rotary_dim": 4}, QV, head="lm_head",
         embedding="wte", norm="ln_1", blocks="h", path="transformer.h.1.attn.q_proj"),
    real("Bloom", "BloomConfig", "BloomForCausalLM", GPT | SIZES, ["query_key_value"],
         head="lm_head", embedding="word_embeddings", norm="input_layernorm", blocks="h",
         path="transformer.h.1.self_attention.query_key_value"),
    real("Mistral", "MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": 4}, QV,
         **LLAMA),
    real("T5", "T5Config", "T5ForConditionalGeneration",
         {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 6, "d_ff": HIDDEN, "num_layers": 2,
          "num_heads": 2, "dropout_rate": 0.0, "use_cache": False}, ["q", "v"], head="lm_head",
         embedding="shared", norm="layer_norm", blocks="block",
         path="encoder.block.1.layer.0.SelfAttention.q"),
    real("BART", "BartConfig", "BartForConditionalGeneration",
         {"vocab_size": VOCAB, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2,
          "encoder_ffn_dim": HIDDEN, "decoder_ffn_dim": HIDDEN, "encoder_attention_heads": 2,
          "decoder_attention_heads": 2, "max_position_embeddings": 24, "dropout": 0.0,
          "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
          "decoder_start_token_id": 2, "forced_eos_token_id": 2}, QV, head="lm_head",
         embedding="shared", norm="self_attn_layer_norm", blocks="layers",
         path="model.encoder.layers.1.self_attn.q_proj"),
    real("BERT", "BertConfig", "BertForSequenceClassification", SIZES, ["query", "value"],
         head="classifier", path="bert.encoder.layer.1.attention.self.query", **BERT),
    real("BERT, tokens", "BertConfig", "BertForTokenClassification", SIZES, ["query", "value"],
         head="classifier", path="bert.encoder.layer.1.attention.self.query", **BERT),
    real("RoBERTa", "RobertaConfig", "RobertaForSequenceClassification", SIZES,
         ["query", "value"], head="classifier",
         path="roberta.encoder.layer.1.attention.self.query", **BERT),
    real("DistilBERT", "DistilBertConfig", "DistilBertForSequenceClassification",
         {"vocab_size": VOCAB, "dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": HIDDEN,
          "max_position_embeddings": 24, "num_labels": 5, "pad_token_id": 0}, ["q_lin", "v_lin"],
         head="classifier", path="distilbert.transformer.layer.1.attention.q_lin",
         **{**BERT, "norm": "sa_layer_norm"}),
    real("ELECTRA", "ElectraConfig", "ElectraForSequenceClassification",
         {**SIZES, "embedding_size": 12}, ["query", "value"], head="classifier",
         path="electra.encoder.layer.1.attention.self.query", **BERT),
    real("GPT-2, sequences", "GPT2Config", "GPT2ForSequenceClassification", GPT,
         ["c_attn", "c_proj"], head="score", **GPT2),
    real("GPT-2, tokens", "GPT2Config", "GPT2ForTokenClassification", GPT, ["c_attn", "c_proj"],
         head="classifier", **GPT2),
    real("Llama, sequences", "LlamaConfig", "LlamaForSequenceClassification", GROUPED, QV,
         **{**LLAMA, "head": "score"}),
)  # fmt: skip

MODELS = {model.name: model for model in (*CUSTOM, *REAL)}
