"""PrefixTuning: the paper's attention, every mask, caches, what it takes, what a file holds."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedModel

import peftlite as pl
from peftlite.methods.features import arguments
from peftlite.methods.keywords import cache_name
from peftlite.methods.prefix import PrefixTuning, is_attention, key_heads
from tests.digest import assert_same, digest
from tests.zoo import KINDS, Kind, hf_gpt2, hf_llama, hf_t5, hf_vit, perturb, seeded

ZOO = {kind.name: kind for kind in KINDS}
B, H, T, D, N = 2, 4, 5, 6, 3  # N is n


def attached(model: nn.Module, name: str = "a", seed: int = 1, **config: Any) -> pl.Delta:
    with seeded(seed):
        return pl.attach(model, PrefixTuning(**{"prefix_length": N, **config}), name)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | float = 0.0) -> Tensor:
    """softmax(qkᵀ/√d + seen)·v, with −∞ where a query may not look."""
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) + seen, -1) @ v


def additive(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)


# -- the paper's attention, for whatever is asked of torch's


class Bare(nn.Module):
    """An attention that is nothing but torch's."""

    num_heads, head_dim = H, D

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)


def qkv(h: int = H) -> tuple[Tensor, Tensor, Tensor]:
    with seeded():
        shapes = (B, H, T, D), (B, h, T + 1, D), (B, h, T + 1, D)
        return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def prefixed(delta: pl.Delta, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values with the delta's in front."""
    (placed,) = delta.placed.values()
    prefix = placed.patch.current().detach().to(k.dtype)
    pairs = zip(prefix, (k, v), strict=True)
    return tuple(torch.cat([p.expand(B, -1, -1, -1), x], 2) for p, x in pairs)


CAUSAL = torch.ones(T, T + 1, dtype=torch.bool).tril()  # from top left, as torch has it
PADDED = torch.arange(T + 1)[None, None, None] >= torch.arange(B)[:, None, None, None]
with seeded():
    BIAS = torch.randn(B, 1, T, T + 1, dtype=torch.float64)


@pytest.mark.parametrize(
    "options, seen",
    [
        ({}, 0.0),
        ({"is_causal": True}, additive(CAUSAL)),
        ({"attn_mask": CAUSAL}, additive(CAUSAL)),
        ({"attn_mask": PADDED & CAUSAL}, additive(PADDED & CAUSAL)),
        ({"attn_mask": BIAS}, BIAS),
        ({"attn_mask": BIAS[..., :1]}, BIAS[..., :1].expand(BIAS.shape)),
    ],
    ids=["bare", "causal", "mask", "padding", "bias", "one_column"],
)
@pytest.mark.parametrize("h", [H, 2, 1])
@pytest.mark.parametrize("reparametrize", [False, True])
def test_it_is_attention_over_what_was_concatenated(
    options: dict, seen: Tensor | float, h: int, reparametrize: bool
) -> None:
    """The n keys are seen by every query, and the masks go on as they were, in both their forms."""
    model, (q, k, v) = Bare(), qkv(h)
    delta = attached(model, num_heads=h, reparametrize=reparametrize, dtype=torch.float64)
    keys, values = (x.repeat_interleave(H // h, 1) for x in prefixed(delta, k, v))
    seen = F.pad(seen, (N, 0)) if isinstance(seen, Tensor) else seen
    expected = softmax_attention(q, keys, values, seen)
    close(model(q, k, v, enable_gqa=True, **options), expected, 1e-12)
    k, v = (x.repeat_interleave(H // h, 1) for x in (k, v))  # as code without enable_gqa does
    y = model(q, k, v, **options)
    close(y, expected, 1e-12)
    assert y.transpose(1, 2).is_contiguous() or y.is_contiguous()


def test_it_is_a_gate_between_the_tokens_and_the_prefix() -> None:
    """(1−λ)·attn(q, K, V) + λ·attn(q, P_k, P_v): He et al., arXiv:2110.04366, eq. 4 and 5."""
    model, (q, k, v) = Bare(), qkv()
    delta = attached(model, dtype=torch.float64)
    p_k, p_v = delta.state_dict()["():prefix"]
    of_prefix, of_tokens = ((q @ x.mT / math.sqrt(D)).exp().sum(-1, True) for x in (p_k, k))
    gate = of_prefix / (of_prefix + of_tokens)
    tokens, prefix = softmax_attention(q, k, v), softmax_attention(q, p_k, p_v)
    close(model(q, k, v), (1 - gate) * tokens + gate * prefix, 1e-12)


def test_two_prefixes_are_one_after_the_other() -> None:
    model, (q, k, v) = Bare(), qkv()
    first, second = (attached(model, name, seed) for seed, name in enumerate("ab"))
    pl.use(model, ["a", "b"])
    keys, values = prefixed(second, *prefixed(first, k, v))
    seen = F.pad(additive(CAUSAL), (2 * N, 0))
    close(model(q, k, v, is_causal=True), softmax_attention(q, keys, values, seen), 1e-6)


def test_keys_of_one_head_may_come_without_a_dimension_for_it() -> None:
    model, x = Bare(), torch.randn(B, T, D)
    (_, p) = attached(model, num_heads=1).placed.popitem()
    k, v = (torch.cat([p.expand(B, -1, -1), x], 1) for p in p.patch.prefix.detach()[:, 0])
    close(model(x, x, x), softmax_attention(x, k, v))


# -- nn.MultiheadAttention


def mha_by_hand(
    m: nn.MultiheadAttention, delta: pl.Delta, q: Tensor, k: Tensor, v: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor]:
    """The output and every head's weights, of inputs (b, t, i)."""
    weights = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    weights = weights if m.in_proj_weight is None else m.in_proj_weight.chunk(3)
    biases = (torch.zeros(m.embed_dim),) * 3 if m.in_proj_bias is None else m.in_proj_bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))
    if m.bias_k is not None:
        k, v = (torch.cat([x, b.expand(B, -1, -1)], 1) for x, b in ((k, m.bias_k), (v, m.bias_v)))
    if m.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    q, k, v = (x.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    k, v = prefixed(delta, k, v)
    seen = F.pad(seen, (N, k.shape[2] - N - seen.shape[-1]))
    weights = torch.softmax(q @ k.mT / math.sqrt(m.head_dim) + seen, -1)
    return m.out_proj((weights @ v).transpose(1, 2).flatten(2)), weights[..., N : -1 or None]


E = 8
KEYS = torch.arange(T + 1)[None] >= T + 1 - torch.arange(B)[:, None]  # True is padding, here
MASKS = {
    "no_mask": {},
    "padding": {"key_padding_mask": KEYS},
    "causal": {"attn_mask": ~CAUSAL, "is_causal": True},
    "bias": {"attn_mask": BIAS.float().expand(-1, 2, -1, -1).flatten(0, 1)},
    "both": {"attn_mask": ~CAUSAL, "key_padding_mask": KEYS},
}


def as_seen(mask: Tensor) -> Tensor:
    return additive(~mask).float() if mask.dtype == torch.bool else mask


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(
    "how",
    [{}, {"kdim": 6, "vdim": 7, "bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}],
    ids=["packed", "apart", "bias_kv", "zero"],
)
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_in_multihead_attention(masks: dict, how: dict, training: bool) -> None:
    """In whatever way it is told to attend; the weights that it returns are those of the tokens."""
    with seeded():
        m = perturb(nn.MultiheadAttention(E, 2, batch_first=True, **how)).train(training)
        q, k, v = (torch.randn(B, t, d) for t, d in ((T, E), (T + 1, m.kdim), (T + 1, m.vdim)))
    delta = attached(m)
    seen = torch.zeros(B, 2, T, T + 1)
    for name, mask in masks.items():
        if name == "attn_mask":
            seen = seen + as_seen(mask).view(-1, 2 if mask.dim() == 3 else 1, T, T + 1)
        elif name == "key_padding_mask":
            seen = seen + as_seen(mask)[:, None, None]
    expected, weights = mha_by_hand(m, delta, q, k, v, seen)
    weights = torch.cat([weights], -1)
    y, none = m(q, k, v, need_weights=False, **masks)
    close(y, expected)
    assert none is None
    y, mean = m(q, k, v, **masks)
    close(y, expected)
    assert mean.shape[-1] == T + 1 + ("add_bias_kv" in how or "add_zero_attn" in how)
    _, each = m(q, k, v, average_attn_weights=False, **masks)
    close(each.mean(1), mean)
    close(each[..., :T], weights[..., :T])
    m.batch_first = False  # (t, b, i)
    close(m(*(x.transpose(0, 1) for x in (q, k, v)), **masks)[0].transpose(0, 1), expected)
    if not masks:
        close(m(q[0], k[0], v[0])[0], expected[0])  # without a batch
    attached(m, "b", 2)
    with pl.using(m, ["a", "b"]):
        both = m(q, k, v) if m.batch_first else m(*(x.transpose(0, 1) for x in (q, k, v)))
    assert both[1].shape == mean.shape


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@torch.no_grad()
def test_padding_in_torchs_own_encoder() -> None:
    """Its paths for inference are as fast as they are since they never come to the attention."""
    layer = nn.TransformerEncoderLayer(E, 2, 12, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(B, T, E)
    attached(model)
    for lengths in ([T, T - 2], [T, T]):
        padding = torch.arange(T)[None] >= torch.tensor(lengths)[:, None]
        y = model(x, src_key_padding_mask=padding)
        for row, length in enumerate(lengths):
            close(y[row, :length], model(x[row : row + 1, :length])[0])


# -- transformers: padding, caches, generation


def language_model(make: Callable[[], Any]) -> Any:
    """With room for what is generated."""
    with seeded():
        model = make()
        model.config.max_position_embeddings = 32
        if make is hf_gpt2:
            model.transformer.wpe = nn.Embedding(32, model.config.n_embd)
        return perturb(model).eval()


PROMPTS = torch.tensor([[0, 0, 5, 7, 11], [3, 1, 4, 15, 9]])
MASK = (PROMPTS != 0).long()


@pytest.mark.parametrize("make", [hf_llama, hf_gpt2])
@torch.no_grad()
def test_generation_from_a_cache_is_generation_without(make: Callable[[], Any]) -> None:
    """The prefix is in no cache, and a row that is padded on the left goes on as it does alone."""
    model = language_model(make)
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    how["pad_token_id"] = 0
    base = model.generate(PROMPTS, attention_mask=MASK, **how)
    attached(model)
    uncached = model.generate(PROMPTS, attention_mask=MASK, use_cache=False, **how)
    assert not torch.equal(uncached, base)
    for cache in ({}, {"cache_implementation": "static"}):
        cached = model.generate(PROMPTS, attention_mask=MASK, use_cache=True, **cache, **how)
        assert torch.equal(cached, uncached)
    alone = model.generate(PROMPTS[:1, 2:], attention_mask=MASK[:1, 2:], **how)
    assert torch.equal(alone[0], uncached[0, 2:])


@pytest.mark.parametrize("make", [hf_llama, hf_gpt2])
@torch.no_grad()
def test_logits_from_a_cache_are_logits_without(make: Callable[[], Any]) -> None:
    model = language_model(make)
    attached(model)
    whole = model(PROMPTS).logits
    begun, name = model(PROMPTS[:, :3], use_cache=True), cache_name(arguments(model))
    assert begun[name].get_seq_length() == 3
    for t in (3, 4):
        begun = model(PROMPTS[:, t : t + 1], **{name: begun[name]}, use_cache=True)
        close(begun.logits[:, 0], whole[:, t])


# -- attention by hand: GPT-J's, and T5's before transformers 5


def t5() -> Any:
    with seeded():
        return perturb(hf_t5()).eval()


def gptj() -> Any:
    sizes = {"vocab_size": 29, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    with seeded():
        return perturb(GPTJForCausalLM(GPTJConfig(**sizes, rotary_dim=4))).eval()


@torch.no_grad()
def test_prefixes_of_t5_have_no_position_bias() -> None:
    model = t5()
    x, states = torch.randn(2, B, T, model.config.d_model)
    delta = attached(model)
    assert len(delta.placed) == 3 * model.config.num_layers or is_attention(model.encoder)
    for path, more in (
        ("encoder", {}),
        ("decoder", {}),
        ("cross", {"key_value_states": states, "query_length": T}),
    ):
        block = (model.encoder if path == "encoder" else model.decoder).block[0]
        layer = block.layer[path == "cross"]
        m = layer.EncDecAttention if path == "cross" else layer.SelfAttention
        (address,) = (a for a in delta.placed if model.get_submodule(a.removesuffix("()")) is m)
        own = pl.Delta("own", [], [delta.placed[address]])
        q, k, v = (
            f(z) for f, z in ((m.q, x), *((f, more.get("key_value_states", x)) for f in (m.k, m.v)))
        )
        q, k, v = (y.unflatten(-1, (m.n_heads, -1)).transpose(1, 2) for y in (q, k, v))
        bias = m.compute_bias(T, T) if path != "cross" else torch.zeros(1, 1, T, T)
        k, v = prefixed(own, k, v)
        weights = torch.softmax(q @ k.mT + F.pad(bias, (N, 0)), -1)
        expected = m.o((weights @ v).transpose(1, 2).flatten(2))
        seen = torch.zeros(B, 1, T, T)
        output = m(x, mask=seen, cache_position=torch.arange(T), **more)
        close(output[0], expected)
        assert output[1].shape[-1] == T  # the next layer has a prefix of its own


@torch.no_grad()
def test_generation_by_hand_is_that_without_a_cache() -> None:
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    how |= {"pad_token_id": 0, "attention_mask": MASK, "decoder_start_token_id": 0}
    for model in (t5(), gptj()):
        model.config.max_position_embeddings = 32
        base = model.generate(PROMPTS, **how)
        attached(model)
        cached = model.generate(PROMPTS, **how)
        assert torch.equal(cached, model.generate(PROMPTS, use_cache=False, **how))
        assert not torch.equal(cached, base)


@torch.no_grad()
def test_padding_on_the_right_in_bert() -> None:
    kind = ZOO["hf_bert"]
    model, batch = kind.model(), kind.batch(3)
    attached(model)
    logits = kind.run(model, batch)
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        alone = {k: v[row : row + 1, :length] for k, v in batch.items()}
        close(kind.run(model, alone)[0], logits[row])


def eager(make: Callable[[], Any]) -> PreTrainedModel:
    model = make()
    model.set_attn_implementation("eager")
    return model


SAYS = r"takes calls of attention that .* type model.set_attn_implementation\(\"sdpa\"\) first\)"


@pytest.mark.parametrize("make", [hf_llama, hf_gpt2, hf_vit])
def test_attention_that_isnt_torchs_is_refused(make: Callable[[], Any]) -> None:
    """However it is asked for, and before anything has changed."""
    model = eager(make)
    before = digest(model)
    names = [n for n, _ in model.named_modules() if n.lower().endswith(("attn", "attention"))]
    for targets in (None, names[0], names[0] + "()", "*attn*"):
        with pytest.raises(pl.TargetError):
            attached(model, targets=targets)
        assert_same(before, digest(model))
    for targets in (names[0], names[0] + "()"):
        with pytest.raises(pl.TargetError, match=SAYS):
            attached(model, targets=targets)


def test_attention_that_stops_being_torchs_is_told() -> None:
    kind = ZOO["hf_llama"]
    model = kind.model()
    attached(model)
    model.set_attn_implementation("eager")
    with pytest.raises(pl.PeftliteError, match=r"self_attn\(\) came to no F.scaled_dot_product"):
        kind.run(model, kind.batch())
    pl.use(model, None)
    kind.run(model, kind.batch())


# -- what it takes


def helper(q: Tensor) -> Tensor:
    return attend(q, q, q)


class Method(nn.Module):
    num_heads, head_dim = 1, E

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)

    @staticmethod
    def attend(x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class Inherited(Method):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class Function(nn.Module):
    num_heads, head_dim = 1, E

    def forward(self, x: Tensor) -> Tensor:
        return next(helper(y) for y in [x])


class Direct(nn.Module):
    """As vision models pool: torch's function of nn.MultiheadAttention, told all by name."""

    num_heads, head_dim = 2, E // 2

    def forward(self, x: Tensor) -> Tensor:
        eye = torch.eye(E)
        none = dict.fromkeys(("in_proj_weight", "bias_k", "bias_v", "out_proj_bias"))
        weights = dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), eye)
        return F.multi_head_attention_forward(
            query=x,
            key=x,
            value=x,
            embed_dim_to_check=E,
            num_heads=self.num_heads,
            in_proj_bias=torch.ones(3 * E),
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=eye,
            use_separate_proj_weight=True,
            **weights,
            **none,
        )[0]


class Around(nn.Module):
    """Calls what attends, and attends not itself."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.attention = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


class Twice(Around):
    def forward(self, x: Tensor) -> Tensor:
        return helper(super().forward(x))


class ByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.mT, -1) @ x


@pytest.mark.parametrize("kind", [Method, Inherited, Function, Direct])
def test_attention_is_found_wherever_the_code_comes_to_it(kind: type[nn.Module]) -> None:
    assert is_attention(kind())
    assert not is_attention(Around(kind())) and not is_attention(ByHand())
    model, x = Around(kind()), torch.randn(B, T, E)
    before = model(x)
    delta = attached(model)
    assert list(delta.placed) == ["attention()"]
    assert not torch.allclose(model(x), before)
    close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_of_two_one_in_the_other_the_inner_one_is_taken() -> None:
    model, x = Twice(Function()), torch.randn(B, T, E)
    assert list(attached(model).placed) == ["attention()"]
    once = model(x)
    attached(model, "b", targets=["()", "attention()"], num_heads=1, head_dim=E)
    assert not torch.allclose(model(x), once)


class Described(nn.Module):
    """An attention with whatever attributes, and maps of these widths."""

    def __init__(self, *widths: tuple[int, int], config: Any = None, **attributes: Any):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(*io) for io in widths)
        for name, value in attributes.items():
            setattr(self, name, value)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return helper(x)


@pytest.mark.parametrize(
    "module, heads",
    [
        (nn.MultiheadAttention(12, 3), (3, 4)),
        (Described(num_heads=3, head_dim=4), (3, 4)),
        (Described(config=Described(n_head=2, n_kv_head=1), head_dim=4), (1, 4)),
        (Described(config=Described(num_key_value_heads=4), num_heads=2, head_dim=4), (2, 4)),
        (Described((16, 12), (16, 12), (16, 12), (12, 16), n_heads=3), (3, 4)),
        (Described((12, 16), (16, 36), n_heads=3), (3, 4)),  # q, k and v in one
        (Described((16, 12), (16, 6), (16, 6), (12, 16), heads=4, kv_heads=2), (2, 3)),
        (Described((16, 24), (12, 16), heads=4, kv_heads=2), (2, 3)),
        (Described((16, 12), (10, 24), (12, 16), heads=4), (4, 3)),  # across, k and v in one
        (Described((16, 16), (16, 16), heads=4), (4, None)),
        (Described((16, 16), (16, 48)), (None, None)),
    ],
    ids=str,
)
def test_the_heads_of_the_keys_are_told_from_the_module(module: nn.Module, heads: tuple) -> None:
    assert key_heads(module) == heads


def test_what_it_cant_tell_it_asks_for() -> None:
    model = Described()
    before = digest(model)
    with pytest.raises(pl.TargetError, match=r"say num_heads= and head_dim="):
        attached(model)
    assert_same(before, digest(model))
    attached(model, num_heads=2, head_dim=3)
    with pytest.raises(pl.PeftliteError, match=r"has 2 heads of 3 features: say num_heads="):
        model(torch.randn(B, 2, T, D))
    with pytest.raises(pl.PeftliteError, match=r"has 2 heads of 3 features: say num_heads="):
        model(torch.randn(2 * B, T, 3))  # whose rows are the heads can't be told
    # one who says both, and where, is believed
    attached(Around(ByHand()), targets="attention()", num_heads=2, head_dim=3)


# -- reparametrised


def trained(kind: Kind) -> tuple[nn.Module, pl.Delta]:
    model = kind.model()
    delta = attached(model, reparametrize=True, hidden_size=7)
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    kind.run(model, kind.batch()).square().mean().backward()
    optimizer.step()
    return model, delta


@torch.no_grad()
def test_a_file_holds_what_the_network_gives(tmp_path) -> None:
    """P = tanh(E·Wᵀ + w)·Uᵀ + u, with E, W and w of all sites; loaded, P alone learns."""
    kind = ZOO["hf_llama"]
    with torch.enable_grad():
        model, delta = trained(kind)
    shared, sites = (N * 8 + 7 * 8 + 7), 2 * (2 * 8 * 7 + 2 * 8)
    assert delta.num_parameters == shared + sites
    state = delta.state_dict()
    trunk = "model.layers.0.self_attn():trunk."
    e, w, b = (state[trunk + name] for name in ("embedding", "down", "down_bias"))
    for address in delta.placed:
        rows = torch.tanh(e @ w.T + b) @ state[f"{address}:up"].T + state[f"{address}:up_bias"]
        close(state[f"{address}:prefix"], rows.view(N, 2, 2, 4).permute(1, 2, 0, 3))
    pl.save(delta, tmp_path / "p.safetensors")
    assert set(pl.inspect(tmp_path / "p.safetensors").tensors) == {
        f"{a}:prefix" for a in delta.placed
    }
    fresh = kind.model()
    loaded = pl.load(fresh, tmp_path / "p.safetensors", trainable=True)
    assert torch.equal(kind.run(fresh, kind.batch()), kind.run(model, kind.batch()))
    assert [tuple(p.shape) for p in loaded.parameters()] == [(2, 2, N, 4)] * 2
    # a checkpoint in memory has the network too
    other = attached(kind.model(), seed=5, reparametrize=True, hidden_size=7)
    other.load_state_dict(state)
    assert all(torch.equal(t, state[key]) for key, t in other.state_dict().items())
