"""BottleneckAdapter: its equations, what its presets take, what calls give, what is refused."""

import math
import re
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftlite as pl
from peftlite.core.site import sites
from peftlite.methods.bottleneck import BottleneckAdapter
from peftlite.methods.features import features, is_called
from tests.digest import assert_same, digest
from tests.zoo import KINDS, TOKENS, WIDTH, Kind, autocast_error, seeded

ZOO = {kind.name: kind for kind in KINDS}
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


def attached(model: nn.Module, name: str = "a", **config: Any) -> pl.Delta:
    """An adapter that makes a difference."""
    with seeded(1), torch.no_grad():
        delta = pl.attach(model, BottleneckAdapter(**config), name)
        for parameter in delta.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return delta


def by_hand(delta: pl.Delta, address: str, z: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """U·f(D·z + d) + u, over the last dimension."""
    own = {k.removeprefix(address + ":"): p for k, p in delta.state_dict().items()}
    return f(z @ own["down"].T + own["down_bias"]) @ own["up"].T + own["up_bias"]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# -- the equations


def test_after_a_call_it_is_y_plus_up_f_down_y() -> None:
    layer, x = nn.Linear(10, WIDTH), torch.randn(3, 10)
    y = layer(x)
    delta = attached(layer, targets="()", scale=0.5)
    close(layer(x), y + 0.5 * by_hand(delta, "()", y, F.gelu))


def test_beside_a_call_it_reads_the_input_and_is_four_times_as_large() -> None:
    layer, x = nn.Linear(10, WIDTH), torch.randn(3, 10)
    y = layer(x)
    delta = attached(layer, targets="()", preset="parallel", reduction_factor=4)
    assert delta.state_dict()["():down"].shape == (WIDTH // 4, 10)
    close(layer(x), y + 4 * by_hand(delta, "()", x, F.relu))


def test_after_a_norm_pfeiffer_normalises_the_sum_again() -> None:
    norm, z = nn.LayerNorm(WIDTH), torch.randn(3, WIDTH)
    y = norm(z)
    delta = attached(norm, targets="()", preset="pfeiffer")
    close(norm(z), F.layer_norm(z + by_hand(delta, "()", y, F.relu), (WIDTH,)))


@pytest.mark.parametrize("conv, x", [
    (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9)),
    (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 9, 8)),
    (nn.Conv2d(4, 6, 3), torch.randn(4, 9, 8)),
    (nn.BatchNorm1d(4), torch.randn(3, 4)),
    (nn.GroupNorm(2, 4), torch.randn(3, 4, 5)),
])  # fmt: skip
def test_on_channels_it_is_a_convolution_with_a_kernel_of_one(conv: nn.Module, x: Tensor) -> None:
    dim = -1 - len(conv.kernel_size) if isinstance(conv, nn.Conv1d | nn.Conv2d) else 1
    delta = attached(conv, targets="()", activation="tanh")
    with pl.using(conv, None):
        y = conv(x)
    change = by_hand(delta, "()", y.movedim(dim, -1), torch.tanh)
    close(conv(x), y + change.movedim(-1, dim))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_activations_are_torchs(activation: Any) -> None:
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    y = layer(x)
    delta = attached(layer, targets="()", activation=activation)
    f = getattr(F, activation, None) or getattr(torch, activation)
    close(layer(x), y + by_hand(delta, "()", y, f))


def test_the_bottleneck_is_a_fraction_of_the_width_and_never_nothing() -> None:
    def rank(**config: Any) -> int:
        delta = pl.attach(nn.Linear(8, 100), BottleneckAdapter(targets="()", **config))
        return len(delta.state_dict()["():down"])

    assert rank() == 6
    assert rank(reduction_factor=0.5) == 200
    assert rank(reduction_factor=1000) == 1
    assert rank(bottleneck_size=7) == 7


def test_the_normal_init_is_cut_off_and_nearly_the_identity() -> None:
    layer, x = nn.Linear(64, 512), torch.randn(3, 64)
    y = layer(x)
    delta = pl.attach(layer, BottleneckAdapter(targets="()", init="normal"))
    tensors = delta.state_dict()
    for name in ("down", "up"):
        drawn = tensors[f"():{name}"]
        assert drawn.abs().max() <= 0.02 and math.isclose(drawn.std(), 0.0088, rel_tol=0.02)
        assert not tensors[f"():{name}_bias"].any()
    assert 0 < (layer(x) - y).abs().max() < 0.05


# -- what presets take

LAYER = "bert.encoder.layer.0."
TAKEN = {
    ("gpt", "houlsby"): ["blocks.0.attn()", "blocks.0.mlp()"],
    ("gpt_fused", "houlsby"): ["blocks.0.attn()", "blocks.0.mlp()"],
    ("gpt", "pfeiffer"): ["blocks.0.mlp()"],
    ("gpt", "parallel"): ["blocks.0.mlp()"],
    ("mha_encoder", "houlsby"): ["0.layers.0.self_attn()", "0.layers.0.linear2()"],
    ("mha_encoder", "pfeiffer"): ["0.layers.0.linear2()"],
    ("mha_decoder", "houlsby"): ["self_attn()", "cross_attn()"],
    ("hf_bert", "houlsby"): [f"{LAYER}attention.output.dense()", f"{LAYER}output.dense()"],
    ("hf_bert", "pfeiffer"): [f"{LAYER}output.LayerNorm()"],
    ("hf_gpt2", "houlsby"): ["transformer.h.0.attn()", "transformer.h.0.mlp()"],
    ("hf_gpt2", "parallel"): ["transformer.h.0.mlp()"],
    ("hf_llama", "houlsby"): ["model.layers.0.self_attn()", "model.layers.0.mlp()"],
    ("hf_llama", "pfeiffer"): ["model.layers.0.mlp()"],
    ("hf_t5", "parallel"): ["encoder.block.0.layer.1.DenseReluDense()"],
}  # fmt: skip


@pytest.mark.parametrize("kind, preset", TAKEN)
def test_presets_take_the_first_layers_outputs(kind: str, preset: Any) -> None:
    plan = pl.plan(ZOO[kind].model(), BottleneckAdapter(preset=preset))
    expected = TAKEN[kind, preset]
    assert plan.addresses[: len(expected)] == expected


class Output(nn.Module):
    """The second half of a sublayer, with its sum, as in the ViT of transformers 4."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(20, WIDTH)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        return self.dense(hidden) + x


def test_pfeiffer_reads_the_sum_where_no_norm_follows_it() -> None:
    model = nn.ModuleDict({"output": Output(), "attention": nn.ModuleDict({"output": Output()})})
    assert pl.plan(model, BottleneckAdapter(preset="pfeiffer")).addresses == ["output()"]
    houlsby = pl.plan(model, BottleneckAdapter()).addresses
    assert houlsby == ["output.dense()", "attention.output.dense()"]


def test_what_isnt_named_as_transformers_are_has_no_default() -> None:
    with pytest.raises(pl.TargetError, match="name some with targets="):
        pl.attach(ZOO["mlp"].model(), BottleneckAdapter())


def test_houlsby_sits_between_a_sublayer_and_its_sum_with_the_stream() -> None:
    kind = ZOO["gpt"]
    model, batch = kind.model(), kind.batch()
    delta = attached(model)

    def sublayer(address: str, z: Tensor) -> Tensor:
        with pl.using(model, None):
            y = model.get_submodule(address)(z)
        return y + by_hand(delta, f"{address}()", y, F.gelu)

    x = model.embed(batch["ids"]) + model.position.weight[:TOKENS]
    for i, block in enumerate(model.blocks):
        x = x + sublayer(f"blocks.{i}.attn", block.attn_norm(x))
        x = x + sublayer(f"blocks.{i}.mlp", block.mlp_norm(x))
    close(model(**batch), model.lm_head(model.norm(x)))


# -- what calls give


class Gives(nn.Module):
    """A layer whose output comes in a wrapping, beside something that must stay what it is."""

    def __init__(self, wrap: Callable[[Tensor, Any], Any], beside: Any):
        super().__init__()
        self.proj, self.wrap, self.beside = nn.Linear(8, 8), wrap, beside

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.proj(x), self.beside)


Pair = namedtuple("Pair", "hidden cache")
WRAPPINGS: list[Callable[[Tensor, Any], Any]] = [
    lambda y, beside: (y, beside),
    lambda y, beside: [y, beside],
    Pair,
    lambda y, beside: {"hidden": y, "cache": beside},
    lambda y, beside: OrderedDict(hidden=y, cache=beside),
]


@pytest.mark.parametrize("wrap", WRAPPINGS)
def test_of_a_collection_the_first_is_changed_and_the_rest_stays(wrap: Any) -> None:
    cache = [torch.zeros(1), {"keys": ()}]
    model, x = Gives(wrap, cache), torch.randn(2, 8)
    first = model.proj(x)
    delta = attached(model, targets="()")
    given = model(x)
    assert type(given) is type(wrap(first, cache))
    y, beside = given.values() if isinstance(given, dict) else given
    close(y, first + by_hand(delta, "()", first, F.gelu))
    assert beside is cache


def test_the_tuples_of_torch() -> None:
    x = torch.randn(2, 5, 8)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
    for model, inputs in [
        (nn.MultiheadAttention(8, 2, batch_first=True), (x, x, x)),
        (nn.LSTM(8, 6, bidirectional=True, batch_first=True), (x,)),
        (nn.GRU(8, 6), (packed,)),
        (nn.LSTMCell(8, 6), (x[0],)),
    ]:
        first, rest = model(*inputs)
        delta = attached(model, targets="()")
        given, same = model(*inputs)
        if inputs == (packed,):
            first, given = first.data, given.data
        close(given, first + by_hand(delta, "()", first, F.gelu))
        torch.testing.assert_close(same, rest)


def test_the_outputs_of_transformers() -> None:
    kind = ZOO["hf_gpt2"]
    model, batch = kind.model(), kind.batch()
    plain = model(**batch, use_cache=True)
    delta = attached(model, targets="()")
    given = model(**batch, use_cache=True)
    assert type(given) is type(plain)
    close(given.logits, plain.logits + by_hand(delta, "()", plain.logits, F.gelu))
    assert type(given.past_key_values) is type(plain.past_key_values)
    with pytest.raises(pl.PeftliteError, match=r"shape \(\) where its adapter works on 29"):
        model(**batch, labels=batch["input_ids"])  # the loss comes first


def test_generation_reads_its_cache_through_adapters() -> None:
    model = ZOO["hf_llama"].model()
    attached(model)
    ids = torch.tensor([[1, 2, 3]])
    options = dict(max_new_tokens=3, do_sample=False, pad_token_id=0)
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


# -- widths


@kinds
@torch.no_grad()
def test_widths_are_what_calls_give(kind: Kind) -> None:
    model, widths = kind.model(), {}
    hooks = [
        m.register_forward_hook(lambda m, _, y: widths.__setitem__(id(m), y))
        for m in model.modules()
    ]
    kind.run(model, kind.batch())
    for hook in hooks:
        hook.remove()
    for site in sites(model):
        wide = features(site) if site.is_call and is_called(site.module) else None
        if wide and (y := widths.get(id(site.module))) is not None:
            while not isinstance(y, Tensor):
                y = next(iter(y.values())) if isinstance(y, dict) else y[0]
            assert y.shape[wide.dim] == wide.o, site.address


class Fourier(nn.Module):
    """No layer of it tells its width."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.sin(), x.cos()], -1)


def test_a_width_that_cant_be_told_is_asked_for() -> None:
    model, x = nn.Sequential(Fourier(), nn.Linear(8, 3)), torch.randn(2, 4)
    before = digest(model)
    with pytest.raises(pl.TargetError, match=r"how wide what 0\(\) .* say width="):
        pl.attach(model, BottleneckAdapter(targets="0()"))
    assert_same(before, digest(model))
    y = model[0](x)
    delta = attached(model, targets="0()", width=8)
    close(model[0](x), y + by_hand(delta, "0()", y, F.gelu))


def test_a_wrong_width_is_an_error_of_its_own() -> None:
    model = nn.Sequential(Fourier(), nn.Linear(8, 3))
    attached(model, targets="0()", width=6)
    says = r"0\(\) has a tensor of shape \(2, 8\) where its adapter works on 6 features"
    with pytest.raises(pl.PeftliteError, match=says):
        model(torch.randn(2, 4))


# -- what is refused


@pytest.mark.parametrize("target, config", [
    ("0.layers.0.self_attn.out_proj()", {}),  # an attention reads its weight, and never calls it
    ("0.layers()", {}),
    ("1.weight", {}),
])  # fmt: skip
def test_what_is_no_call_is_refused(target: str, config: dict[str, Any]) -> None:
    with pytest.raises(pl.TargetError, match="BottleneckAdapter takes calls that are made"):
        pl.attach(ZOO["mha_encoder"].model(), BottleneckAdapter(targets=target, **config))


@pytest.mark.parametrize("given, shown", [((), "()"), (None, "None"), ([{}], "{}")])
def test_what_begins_with_no_tensor_is_an_error(given: Any, shown: str) -> None:
    model = Gives(lambda y, beside: beside, given)
    attached(model, targets="()")
    with pytest.raises(pl.PeftliteError, match=re.escape(f"() has {shown} where its")):
        model(torch.randn(2, 8))


def test_beside_ids_there_are_no_features() -> None:
    with pytest.raises(pl.TargetError, match=r"how wide what embed\(\) takes"):
        pl.attach(ZOO["gpt"].model(), BottleneckAdapter(preset="parallel", targets="embed()"))


@pytest.mark.parametrize("config, says", [
    ({"preset": "adapterh"}, "preset must be one of 'houlsby', 'pfeiffer', 'parallel'"),
    ({"activation": "swish"}, "activation must be one of 'relu', 'gelu', 'silu', 'tanh'"),
    ({"init": None}, "init must be one of 'zero', 'normal', not None"),
    ({"reduction_factor": 0}, "reduction_factor must be finite and above 0"),
    ({"bottleneck_size": 0}, "bottleneck_size must be a whole number from 1 up"),
    ({"scale": math.inf}, "scale must be finite and above 0"),
    ({"width": 1.5}, "width must be a whole number from 1 up"),
])  # fmt: skip
def test_settings_are_checked(config: dict[str, Any], says: str) -> None:
    with pytest.raises(pl.PeftliteError, match=says):
        BottleneckAdapter(**config)


# -- in company


@pytest.mark.parametrize("target", ["*.self_attn()", "*.linear2()", "*.norm1()", "*.layers.0()"])
def test_torchs_fused_layer_doesnt_pass_an_adapter_by(target: str) -> None:
    kind = ZOO["mha_encoder"]
    model, batch = kind.model(), kind.batch()
    base = kind.run(model, batch)
    attached(model, targets=target)
    slow = kind.run(model, batch)
    assert not torch.allclose(slow, base)
    with torch.no_grad():
        close(kind.run(model, batch), slow)


def test_over_other_methods_and_one_another() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    methods = [pl.LoRA(rank=2, targets="weight"), BottleneckAdapter(targets="()")]
    both = pl.attach(layer, methods, "both")
    again = attached(layer, "again", targets="()")
    with torch.no_grad():
        for parameter in both.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    pl.use(layer, ["both", "again"])
    own = both.state_dict()
    y = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(
        layer.weight, own["weight:b"] @ own["weight:a"] + layer._parameters["weight"]
    )
    y = y + by_hand(both, "()", y, F.gelu)
    close(layer(x), y + by_hand(again, "()", y, F.gelu))


def test_half_precision_keeps_its_dtype_and_learns_in_fp32() -> None:
    kind = ZOO["hf_llama"]
    model = kind.model(torch.bfloat16)
    delta = attached(model)
    logits = kind.run(model, kind.batch())
    assert logits.dtype is torch.bfloat16
    logits.float().square().mean().backward()
    assert all(p.dtype is torch.float32 and p.grad.any() for p in delta.parameters())


def test_under_autocast() -> None:
    kind = ZOO["gpt"]
    model, batch = kind.model(), kind.batch()
    of_the_base = autocast_error(model, batch)
    attached(model, targets=["*.mlp()", "*.attn_norm()"])
    assert autocast_error(model, batch) < 2 * of_the_base


def test_a_merge_is_refused() -> None:
    model = ZOO["gpt"].model()
    attached(model)
    with pytest.raises(pl.PeftliteError, match="changes calls, which no weight can hold"):
        pl.merge(model, "a")
