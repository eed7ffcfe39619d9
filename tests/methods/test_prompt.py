"""PromptTuning and PTuning: their equations, peft's logits, caches, masks, pools, and refusals."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    EncoderDecoderModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import peftlite as pl
from peftlite.methods.features import arguments
from peftlite.methods.keywords import CACHES, cache_name
from peftlite.methods.prompt import PromptTuning
from peftlite.methods.ptuning import PTuning
from tests.digest import assert_same, digest
from tests.zoo import GPT, VOCAB, WIDTH, perturb, seeded

N = 3


def sized(heads: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "intermediate_size": 20,
        "max_position_embeddings": 32,
        **more,
    }


BERT = BertConfig(**sized(), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
LLAMA = LlamaConfig(**sized(), eos_token_id=None, pad_token_id=0)
GPT2 = GPT2Config(
    vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
T5 = T5Config(
    vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=20, num_layers=2, num_heads=2, dropout_rate=0.0,
    decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
)  # fmt: skip
BART = BartConfig(
    vocab_size=VOCAB, d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20, max_position_embeddings=32,
    decoder_start_token_id=0, pad_token_id=0, dropout=0.0, forced_eos_token_id=None,
)  # fmt: skip


def made(kind: Callable[[Any], nn.Module], config: Any) -> Any:
    """The same model on every call."""
    with seeded():
        return perturb(kind(config)).eval()


def tokens(b: int = 2, t: int = 5) -> Tensor:
    with seeded(7):
        return torch.randint(1, VOCAB, (b, t))


def attached(model: nn.Module, name: str = "a", method: Any = PromptTuning, **config: Any) -> Any:
    """A prompt that makes a difference, and its rows."""
    with seeded(len(name) + ord(name[0])):
        delta = pl.attach(model, method(**{"prompt_length": N, **config}), name)
    return delta, rows_of(delta)


def rows_of(delta: pl.Delta) -> Tensor:
    (rows,) = delta.saved().values()
    return rows


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def before(rows: Tensor, x: Tensor) -> Tensor:
    return torch.cat([rows.expand(len(x), -1, -1), x], 1)


# -- the equation


@pytest.mark.parametrize("tied", [False, True])
def test_the_rows_stand_before_the_embeddings(tied: bool) -> None:
    model = made(lambda tied: GPT(tied=tied), tied)
    base, ids = copy.deepcopy(model), tokens()
    _, rows = attached(model)
    x = before(rows, base.embed(ids))
    x = x + base.position(torch.arange(x.shape[1]))
    for block in base.blocks:
        x = block(x)
    close(model(ids), base.lm_head(base.norm(x))[:, N:])


def test_prompts_of_two_deltas_follow_one_another() -> None:
    model = made(LlamaForCausalLM, LLAMA)
    base, ids = copy.deepcopy(model), tokens()
    _, a = attached(model, "a")
    _, b = attached(model, "b", prompt_length=2)
    for names in (["a", "b"], ["b", "a"]):
        pl.use(model, names)
        rows = torch.cat([a, b] if names[0] == "a" else [b, a])
        x = before(rows, base.model.embed_tokens(ids))
        close(model(ids).logits, base(inputs_embeds=x).logits[:, N + 2 :])
    pl.detach(model, "a")
    _, c = attached(model, "c")
    pl.use(model, ["b", "c"])
    x = before(torch.cat([b, c]), base.model.embed_tokens(ids))
    close(model(ids).logits, base(inputs_embeds=x).logits[:, N + 2 :])


def test_embeddings_in_place_of_ids() -> None:
    for kind, config in ((LlamaForCausalLM, LLAMA), (BertForTokenClassification, BERT)):
        model, ids = made(kind, config), tokens()
        embedded = model.get_input_embeddings()(ids)
        attached(model)
        close(model(inputs_embeds=embedded).logits, model(ids).logits)


def test_inits() -> None:
    def rows(**config: Any) -> Tensor:
        return attached(made(GPT2LMHeadModel, GPT2), **config)[1]

    drawn = rows(prompt_length=20)
    assert 0.4 < drawn.abs().max() <= 0.5
    words = made(GPT2LMHeadModel, GPT2).transformer.wte.weight
    sampled = rows(prompt_length=20, init="vocabulary")
    assert all(any(torch.equal(row, word) for word in words) for row in sampled)
    assert torch.equal(rows(init="text", init_ids=[4, 9], prompt_length=5), words[[4, 9, 4, 9, 4]])
    assert torch.equal(rows(init="text", init_ids=(4, 9, 2, 1)), words[[4, 9, 2]])


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_a_file_of_ptuning_has_the_rows_alone_and_learns_on(encoder: Any, tmp_path: Any) -> None:
    model, ids = made(GPT2LMHeadModel, GPT2), tokens()
    delta, rows = attached(model, method=PTuning, encoder=encoder)
    assert rows.shape == (N, WIDTH) and delta.num_parameters > rows.numel()
    output = model(ids).logits
    output.sum().backward()
    assert all(p.grad is not None for p in delta.parameters())
    pl.save(delta, tmp_path / "p.safetensors")
    fresh = made(GPT2LMHeadModel, GPT2)
    loaded = pl.load(fresh, tmp_path / "p.safetensors", trainable=True)
    assert loaded.num_parameters == rows.numel()
    assert torch.equal(fresh(ids).logits, output)
    fresh(ids).logits.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in loaded.parameters())


def test_a_checkpoint_of_ptuning_has_the_encoder_too() -> None:
    model, other = made(GPT2LMHeadModel, GPT2), made(GPT2LMHeadModel, GPT2)
    delta, _ = attached(model, "a", PTuning)
    copied, _ = attached(other, "b", PTuning)
    copied.load_state_dict(delta.state_dict())
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)


# -- peft

PEERS = {
    "llama": (LlamaForCausalLM, LLAMA, "CAUSAL_LM"),
    "gpt2": (GPT2LMHeadModel, GPT2, "CAUSAL_LM"),
    "t5": (T5ForConditionalGeneration, T5, "SEQ_2_SEQ_LM"),
    "bert": (BertForTokenClassification, BERT, "TOKEN_CLS"),
}


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("method", ["prompt", "mlp", "lstm"])
def test_logits_are_pefts(kind: str, method: str) -> None:
    make, config, task = PEERS[kind]
    model, base = made(make, config), made(make, config)
    common: dict[str, Any] = {
        "task_type": task,
        "num_virtual_tokens": N,
        "num_transformer_submodules": 1,
    }
    if method == "prompt":
        delta, rows = attached(model)
        theirs = peft.get_peft_model(base, peft.PromptTuningConfig(**common))
        with torch.no_grad():
            theirs.prompt_encoder["default"].embedding.weight[:N] = rows
    else:
        delta, _ = attached(model, method=PTuning, encoder=method, hidden_size=7)
        config = peft.PromptEncoderConfig(
            **common,
            encoder_hidden_size=7,
            encoder_num_layers=2,
            encoder_reparameterization_type=method.upper(),
        )
        theirs = peft.get_peft_model(base, config)
        encoder = theirs.prompt_encoder["default"]
        with torch.no_grad():
            own = [p for _, p in delta.named_parameters()]
            gates = [*encoder.lstm_head.parameters()] if method == "lstm" else []
            maps = [*encoder.mlp_head.parameters()]
            theirs_in_order = [encoder.embedding.weight[:N], *gates, *maps]
            for mine, other in zip(own, theirs_in_order, strict=True):
                other.copy_(mine)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100  # peft has the prompt predict the first token
    types = (torch.arange(5) > 2).long().expand(2, -1)
    more = {"token_type_ids": types} if kind == "bert" else {"labels": labels}
    ours = model(ids, attention_mask=mask, **more)
    expected = theirs.eval()(ids, attention_mask=mask, **more)
    cut = 0 if kind == "t5" else N
    seen = mask.bool() | (kind == "t5")
    close(ours.logits[seen], expected.logits[:, cut:][seen])
    if "labels" in more:
        close(ours.loss, expected.loss)


# -- outputs


def test_outputs_have_the_shapes_of_the_base() -> None:
    for kind, config in ((LlamaForCausalLM, LLAMA), (BertForSequenceClassification, BERT)):
        model, ids = made(kind, config), tokens()
        plain = model(ids, output_hidden_states=True)
        delta, _ = attached(model)
        output = model(ids, output_hidden_states=True)
        assert output.logits.shape == plain.logits.shape
        assert [h.shape for h in output.hidden_states] == [h.shape for h in plain.hidden_states]
        assert torch.equal(model(ids, return_dict=False)[0], output.logits)
        output.logits.sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in delta.parameters())


@pytest.mark.parametrize("make, config", [
    (BertForSequenceClassification, BERT),
    (AlbertModel, AlbertConfig(**sized(), embedding_size=8, inner_group_num=1)),
])  # fmt: skip
def test_the_first_real_token_is_pooled(make: Any, config: Any) -> None:
    model, ids = made(make, config), tokens()
    base = copy.deepcopy(model)
    _, rows = attached(model)
    stack = getattr(base, "bert", base)
    x = before(rows, base.get_input_embeddings()(ids))
    last = stack(inputs_embeds=x).last_hidden_state[:, N:]
    if make is AlbertModel:
        pooled = stack.pooler_activation(stack.pooler(last[:, 0]))
        close(model(ids).pooler_output, pooled)
        close(model(ids).last_hidden_state, last)
    else:
        close(model(ids).logits, base.classifier(stack.pooler(last)))


def test_the_last_real_token_is_classified() -> None:
    model = made(GPT2ForSequenceClassification, GPT2)
    attached(model)
    short, ids = tokens(1, 3), F.pad(tokens(1, 3), (0, 2))
    close(model(ids, attention_mask=(ids > 0).long()).logits, model(short).logits)


def test_padding_is_not_seen() -> None:
    ids, mask = tokens(), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for make, config in (
        (BertForTokenClassification, BERT),
        (RobertaForTokenClassification, RobertaConfig(**sized(), pad_token_id=0)),
        (LlamaForCausalLM, LLAMA),
    ):
        model = made(make, config)
        attached(model)
        padded = model(ids.masked_fill(mask == 0, 0), attention_mask=mask).logits
        close(padded[:1, :3], model(ids[:1, :3]).logits)
        close(padded[1:], model(ids[1:]).logits)


@pytest.mark.parametrize("make, config", [
    (T5ForConditionalGeneration, T5),
    (BartForConditionalGeneration, BART),
])  # fmt: skip
def test_an_encoder_shows_its_prompt_to_the_decoder(make: Any, config: Any) -> None:
    model, ids = made(make, config), tokens()
    plain = model(ids, labels=ids)
    _, rows = attached(model)
    base = made(make, config)
    output = model(ids, labels=ids, output_hidden_states=True)
    x = before(rows, base.get_input_embeddings()(ids))
    close(output.logits, base(inputs_embeds=x, labels=ids).logits)
    assert output.encoder_last_hidden_state.shape == plain.encoder_last_hidden_state.shape
    assert model.get_encoder()(ids).last_hidden_state.shape == (2, N + 5, WIDTH)
    with pl.using(model, rows=["a", None]):  # the base row beside it
        mixed = model(ids, decoder_input_ids=ids, use_cache=False).logits
    close(mixed[1:], base(ids[1:], decoder_input_ids=ids[1:]).logits)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    masked = model(ids, attention_mask=mask, decoder_input_ids=ids).logits
    close(masked[:1], model(ids[:1, :3], decoder_input_ids=ids[:1]).logits)


def test_a_pooling_encoder_keeps_the_prompt_for_its_decoder() -> None:
    def make(_: Any) -> nn.Module:
        decoder = GPT2Config(**{**GPT2.to_dict(), "add_cross_attention": True})
        return EncoderDecoderModel(
            None, BertForSequenceClassification(BERT).bert, GPT2LMHeadModel(decoder)
        )

    model, ids = made(make, None), tokens()
    base = copy.deepcopy(model)
    _, rows = attached(model)
    x = before(rows, base.encoder.get_input_embeddings()(ids))
    for mask in (None, torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])):
        longer = None if mask is None else F.pad(mask, (N, 0), value=1)
        expected = base(inputs_embeds=x, attention_mask=longer, decoder_input_ids=ids).logits
        close(model(ids, attention_mask=mask, decoder_input_ids=ids).logits, expected)


def test_a_prompt_for_the_decoder_beside_the_encoders() -> None:
    model, ids = made(T5ForConditionalGeneration, T5), tokens()
    base = copy.deepcopy(model)
    _, one = attached(model, "encoder")
    delta, two = attached(model, "decoder", targets="decoder()", prompt_length=2)
    assert next(iter(delta.placed)) == "decoder()"
    pl.use(model, ["encoder", "decoder"])
    expected = base(
        inputs_embeds=before(one, base.shared(ids)),
        decoder_inputs_embeds=before(two, base.shared(ids[:, :4])),
    )
    close(model(ids, decoder_input_ids=ids[:, :4]).logits, expected.logits[:, 2:])


# -- generation


def argmax_loop(model: Any, ids: Tensor, mask: Tensor | None, steps: int) -> Tensor:
    """Greedy decoding without a cache."""
    for _ in range(steps):
        where = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        logits = model(ids, attention_mask=mask, use_cache=False, **where).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = None if mask is None else F.pad(mask, (0, 1), value=1)
    return ids


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_equals_the_uncached_loop(kind: str) -> None:
    make, config, _ = PEERS[kind]
    model, ids = made(make, config), tokens()
    attached(model, "a")
    attached(model, "b", prompt_length=2)
    padded = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for names in ("a", ["a", "b"]):
        pl.use(model, names)
        for mask in (None, padded):
            # transformers makes up a mask where there's none
            got = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
            assert torch.equal(got, argmax_loop(model, ids, mask, 8))
    assert model.generate(ids, num_beams=3, max_new_tokens=4).shape == (2, 9)
    alone = model.generate(ids[:1, 2:], max_new_tokens=4, do_sample=False)
    pair = model.generate(ids, attention_mask=padded, max_new_tokens=4, do_sample=False)
    assert torch.equal(alone[:, 3:], pair[:1, 5:])


def test_generate_with_an_encoder() -> None:
    model, ids = made(T5ForConditionalGeneration, T5), tokens()
    attached(model, "encoder")
    attached(model, "decoder", targets="decoder()")
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for names in ("encoder", "decoder", ["encoder", "decoder"]):
        pl.use(model, names)
        out = torch.zeros(2, 1, dtype=torch.long)
        for _ in range(6):
            step = model(ids, attention_mask=mask, decoder_input_ids=out, use_cache=False)
            out = torch.cat([out, step.logits[:, -1:].argmax(-1)], 1)
        got = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert torch.equal(got, out)
        model.generate(ids, attention_mask=mask, num_beams=2, max_new_tokens=3)


@torch.no_grad()
def test_a_cache_holds_the_prompt_once() -> None:
    model, ids = made(LlamaForCausalLM, LLAMA), tokens()
    attached(model)
    whole = model(ids).logits
    start, name = model(ids[:, :2], use_cache=True), cache_name(arguments(model))
    assert start[name].get_seq_length() == N + 2
    for extra in ({}, {"attention_mask": torch.ones_like(ids)}):
        cache = {name: copy.deepcopy(start[name])}
        rest = model(ids[:, 2:], **cache, **extra).logits
        close(torch.cat([start.logits, rest], 1), whole)


def test_a_cache_is_not_given_to_another_generate() -> None:
    model, ids = made(LlamaForCausalLM, LLAMA), tokens(2, 9)
    attached(model)
    name = cache_name(arguments(model))
    cache = {name: model(ids[:, :3], use_cache=True)[name]}
    with pytest.raises(pl.PeftliteError, match="a cache that holds a prompt can't be"):
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        model.generate(ids, attention_mask=mask, **cache, max_new_tokens=2)
    with pytest.raises(pl.PeftliteError, match=r"attention_mask \(2, 1, 9, 9\), which can't"):
        model(ids, attention_mask=torch.ones(2, 1, 9, 9))


# -- models of one's own


class Loss(GPT):
    """A GPT that gives its loss as well."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        logits = super().forward(idx)
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def test_arguments_of_ones_own() -> None:
    model, ids = Loss().eval(), tokens()
    attached(model, fill={"targets": -1})
    logits, loss = model(ids, ids)
    assert logits.shape == (2, 5, VOCAB)
    close(loss, F.cross_entropy(logits.flatten(0, 1), ids.flatten()))
    close(model(idx=ids, targets=ids)[1], loss)


class Translator(nn.Module):
    """An encoder that takes ids, and a decoder that attends to what it gives."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(VOCAB, WIDTH), nn.Embedding(VOCAB, WIDTH)
        self.encoder = nn.Sequential(self.source, nn.Linear(WIDTH, WIDTH))
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        memory = self.encoder(src)
        return self.attn(self.target(tgt), memory, memory)[0]


def test_an_encoder_of_ones_own() -> None:
    model, ids = Translator().eval(), tokens()
    base = copy.deepcopy(model)
    delta, rows = attached(model, targets="encoder()", cut=False)
    assert list(delta.placed) == ["encoder()", "source()"]
    memory = base.encoder[1](before(rows, base.source(ids)))
    close(model(ids, ids[:, :4]), base.attn(base.target(ids[:, :4]), memory, memory)[0])
    with pytest.raises(pl.PeftliteError, match=r"with tgt \(2, 4\), which can't be made 3 tokens"):
        attached(model, "b")
        model(ids, ids[:, :4])


def test_a_named_embedding() -> None:
    model = Translator()
    delta = pl.attach(model, PromptTuning(targets=["()", "target()"], fill={"src": None}))
    assert list(delta.placed) == ["()", "target()"]
    assert list(pl.plan(Translator(), PromptTuning(targets="target()")).addresses) == [
        "()",
        "target()",
    ]


class Wrapped(nn.Module):
    """A transformers model inside another, called in a way of its own."""

    def __init__(self):
        super().__init__()
        self.lm = BertForSequenceClassification(BERT).bert
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.head(self.lm(**batch).last_hidden_state)


def test_a_model_inside_another() -> None:
    model = Wrapped().eval()
    delta, _ = attached(model)
    assert list(delta.placed) == ["lm()", "lm.encoder()", "lm.embeddings.word_embeddings()"]
    assert model({"input_ids": tokens()}).shape == (2, 5, 2)


# -- mixing, precision, devices


def test_rows_of_several_lengths_and_none_in_one_batch() -> None:
    model, ids = made(LlamaForCausalLM, LLAMA), tokens(4)
    attached(model, "a")
    attached(model, "b", prompt_length=5)
    rows = ["b", None, "a", ["a", "b"]]
    with pl.using(model, rows=rows):
        mixed = model(ids, use_cache=False).logits
    for i, names in enumerate(rows):
        with pl.using(model, names):
            close(model(ids[i : i + 1]).logits, mixed[i : i + 1])


def test_half_precision_and_the_meta_device() -> None:
    model = made(LlamaForCausalLM, LLAMA).bfloat16()
    _, rows = attached(model)
    assert rows.dtype is torch.float32 and model(tokens()).logits.dtype is torch.bfloat16
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA)
    delta = pl.attach(model, PromptTuning(init="vocabulary"))
    assert all(p.is_meta for p in delta.parameters())
    assert pl.plan(made(LlamaForCausalLM, LLAMA), PTuning()).num_bytes == 20 * WIDTH * 4


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_transformers_own_checkpointing() -> None:
    model, ids = made(GPT2LMHeadModel, GPT2), tokens()
    delta, _ = attached(model)
    (parameter,) = delta.parameters()
    model(ids, labels=ids).loss.backward()
    plain, parameter.grad = parameter.grad, None
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model(ids, labels=ids, use_cache=False).loss.backward()
    close(parameter.grad, plain)


# -- refusals


@pytest.mark.parametrize("config, says", [
    ({"prompt_length": 0}, "prompt_length must be a whole number from 1 up, not 0"),
    ({"init": "zero"}, "init must be one of 'random', 'vocabulary', 'text', not 'zero'"),
    ({"init": "text"}, 'init="text" takes init_ids='),
    ({"init_ids": [1]}, 'init="text" takes init_ids='),
])  # fmt: skip
def test_config_is_checked(config: dict[str, Any], says: str) -> None:
    with pytest.raises(pl.PeftliteError, match=says):
        PromptTuning(**config)


@pytest.mark.parametrize("config, says", [
    ({"prompt_length": 32}, "model.. has 32 positions, which a prompt of 32 leaves none of"),
    ({"init": "text", "init_ids": [VOCAB]}, "beyond model.embed_tokens.., which has 29"),
    ({"targets": "model.embed_tokens.weight"}, "takes the one call of a module that looks up"),
    ({"targets": "model.layers.0()"}, "model.layers.0.. is a call; PromptTuning takes the one"),
    ({"targets": ["()", "model()"]}, "is a call; PromptTuning takes the one call"),
    ({"targets": "lm_head"}, "matches lm_head"),
])  # fmt: skip
def test_targets_are_checked(config: dict[str, Any], says: str) -> None:
    model = made(LlamaForCausalLM, LLAMA)
    before = digest(model)
    with pytest.raises(pl.TargetError, match=says):
        pl.attach(model, PromptTuning(**config))
    assert_same(before, digest(model))


def test_an_embedding_alone_has_nothing_around_it() -> None:
    with pytest.raises(pl.TargetError, match="takes the one call of a module that looks up"):
        pl.attach(nn.Embedding(4, 4), PromptTuning())


def test_calls_are_checked() -> None:
    model, ids = GPT().eval(), tokens()
    attached(model)
    with pytest.raises(pl.PeftliteError, match=r"called without token ids of shape \(b, t\)"):
        model(ids[0])
    model = made(LlamaForCausalLM, LLAMA)
    attached(model)
    with pytest.raises(pl.PeftliteError, match=r"called with visual .* say fill="):
        model(ids, visual=torch.zeros(2, 5, 3))


def test_a_cache_of_an_unknown_kind_is_refused_whatever_fill_says() -> None:
    model, ids = made(LlamaForCausalLM, LLAMA), tokens()
    attached(model, fill={name: None for name in CACHES})
    for name, cache in (("cache_params", object()), ("mems", [torch.zeros(5, 2, WIDTH)])):
        with pytest.raises(pl.PeftliteError, match=f"called with {name} .*pass use_cache=False"):
            model.model(ids, **{name: cache})
