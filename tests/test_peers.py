"""The peers' known failures, turned into what peftlite does; real peft beside it where it is right.

A number such as #1388 is an issue of huggingface/peft. Where peft is right, the two must agree to
1e-5. Where it differs or refuses, a docstring says so, and only what is right is asserted here.
"""

import copy
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import prune

import peftlite as pl
from tests.cells import Graphs, close, disturb, in_threads
from tests.digest import assert_same, bits, digest
from tests.zoo import CLASSES, KINDS, VOCAB, WIDTH, Kind, seeded

KIND = {kind.name: kind for kind in KINDS}


def kinds(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", [KIND[name] for name in names], ids=str)


def attached(
    name: str, targets: Any = None, base: torch.dtype = torch.float32, **how: Any
) -> tuple[nn.Module, pl.Delta, Callable[..., Tensor]]:
    """A model of the zoo with a LoRA that makes a difference, and a call of it on its batch."""
    kind = KIND[name]
    model, batch = kind.model(base), functools.cache(lambda b: kind.batch(b, base))

    def run(b: int = 2, model: nn.Module = model) -> Tensor:
        return kind.run(model, batch(b))

    return model, add(model, "a", targets, **how), run


def add(model: nn.Module, name: str, targets: Any = None, **how: Any) -> pl.Delta:
    return disturb(pl.attach(model, pl.LoRA(**{"rank": 2, "targets": targets} | how), name))


@contextmanager
def refused(
    model: nn.Module, error: type[BaseException], message: str | None = None
) -> Iterator[None]:
    """The body raises, and leaves the model as it was."""
    before = digest(model)
    with pytest.raises(error, match=message):
        yield
    assert_same(before, digest(model))


def base_bits(model: nn.Module) -> dict[str, bytes]:
    """The bytes of the base's parameters."""
    return {n: bits(p) for n, p in model.named_parameters() if ".peftlite." not in f".{n}"}


def trainable(model: nn.Module) -> list[bool]:
    return [p.requires_grad for p in model.parameters()]


# -- where peft is right, the two agree

SAME = {
    "mlp": ["0", "2", "4"],
    "conv1d": ["0", "2"],
    "conv3d": ["0", "2"],
    "conv1d_hf": ["0", "2"],
    "embedding": ["embed", "head"],
    "hf_bert": ["query", "value", "dense", "word_embeddings"],
    "hf_gpt2": ["c_attn", "c_proj", "c_fc", "wpe"],
    "hf_llama": ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"],
    "hf_t5": ["q", "v", "wi", "wo", "relative_attention_bias"],
    "hf_vit": ["projection", "classifier"],
}


def under_peft(model: nn.Module, method: pl.LoRA, name: str = "default", **more: Any) -> PeftModel:
    """The model under peft, by the same method, with random factors in place of zeros."""
    return get_peft_model(model, config(model, method, **more), adapter_name=name).eval()


def config(model: nn.Module, method: pl.LoRA, **more: Any) -> LoraConfig:
    return LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        use_rslora=method.scaling == "rslora",
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        **{"target_modules": method.targets, "init_lora_weights": False} | more,
    )


def layers(theirs: PeftModel) -> dict[str, Any]:
    """peft's adapted layers by the address of the weight."""
    modules = theirs.get_base_model().named_modules()
    return {f"{path}.weight": m for path, m in modules if hasattr(m, "get_delta_weight")}


def factors(layer: Any, name: str = "default") -> tuple[nn.Parameter, nn.Parameter]:
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def pairs(
    delta: pl.Delta, theirs: PeftModel, name: str = "default"
) -> Iterator[tuple[Any, Any, list[tuple[Tensor, Tensor]]]]:
    """What each has at every site, and its factors; peft's kernels are those of convolutions."""
    found = layers(theirs)
    assert set(found) == set(delta.placed)
    for address, layer in found.items():
        placed = delta.placed[address]
        own = (placed.patch.a, placed.patch.b)
        yield placed, layer, list(zip(own, factors(layer, name), strict=True))


@torch.no_grad()
def copy_factors(delta: pl.Delta, theirs: PeftModel, name: str = "default") -> None:
    for _, _, both in pairs(delta, theirs, name):
        for own, their in both:
            own.copy_(their.reshape(own.shape))


@kinds(*SAME)
@pytest.mark.parametrize(
    "how", [{"alpha": 5, "dropout": 0.25}, {"alpha": 3, "scaling": "rslora"}], ids=["plain", "rs"]
)
def test_the_same_factors_are_the_same_function(kind: Kind, how: dict) -> None:
    """ΔW, outputs, dropout masks, gradients and merged weights are peft's."""
    method = pl.LoRA(rank=3, targets=SAME[kind.name], **how)
    theirs, ours = under_peft(kind.model(), method), kind.model()
    delta = pl.attach(ours, method)
    copy_factors(delta, theirs)
    outputs = []
    for model in (theirs.train(), ours.train()):
        with seeded(7):
            outputs.append(kind.run(model, kind.batch()))
        outputs[-1].square().mean().backward()
    close(*outputs)
    for placed, layer, both in pairs(delta, theirs):
        change = placed.patch.eval().value(placed.site.whole) - placed.site.whole
        close(change, layer.get_delta_weight("default"))
        # peft's B learns from padding, though an embedding's padding row takes no gradients
        if getattr(placed.site.module, "padding_idx", None) is None:
            for own, their in both:
                close(own.grad, their.grad.reshape(own.shape))
    pl.merge(ours.eval(), "default")
    theirs.eval().merge_adapter()
    for placed, layer, _ in pairs(delta, theirs):
        close(placed.site.whole, layer.get_base_layer().weight)
    close(kind.run(ours, kind.batch()), kind.run(theirs, kind.batch()))


@kinds("mlp", "hf_bert", "hf_gpt2")
def test_choices_mean_what_they_mean_in_peft(kind: Kind) -> None:
    """One adapter, the sum of two, none, and one per row: peft's mixed batch is right for LoRA."""
    method = pl.LoRA(rank=3, alpha=5, targets=SAME[kind.name][:3])
    theirs = under_peft(kind.model(), method, "sql")
    theirs.add_adapter("chat", config(kind.model(), method))
    theirs.eval()
    ours, batch = kind.model(), kind.batch(4)
    for name in ("sql", "chat"):
        copy_factors(pl.attach(ours, method, name), theirs, name)
    for names in (["sql"], ["chat"], ["sql", "chat"]):
        theirs.base_model.set_adapter(names)
        pl.use(ours, names)
        close(kind.run(ours, batch), kind.run(theirs, batch))
    with theirs.disable_adapter(), pl.using(ours, None):
        close(kind.run(ours, batch), kind.run(theirs, batch))
    with pl.using(ours, rows=["chat", None, "sql", "chat"]):
        mixed = kind.run(ours, batch)
    names = ["chat", "__base__", "sql", "chat"]
    close(mixed, kind.run(theirs, {**batch, "adapter_names": names}))


@pytest.mark.parametrize(
    "name, target",
    [("mha_seq_first", "attn.in_proj_weight"), ("gru", "rnn.weight_hh_l0"), ("experts", "w_in")],
)
def test_tensors_without_a_layer_change_as_in_peft(name: str, target: str) -> None:
    """Attention's, recurrent and experts' weights (#2527, #3340).

    peft takes no parameter of the root, and adds its ΔW of an attention's out_proj twice.
    """
    kind, target = KIND[name], f"0.{target}"
    method = pl.LoRA(rank=2, alpha=5, targets=target)
    where = {"target_modules": [], "target_parameters": [target]}
    if name == "mha_seq_first":
        where = {"target_modules": ["0.attn"]}
    ours = nn.Sequential(kind.model())
    theirs = under_peft(nn.Sequential(kind.model()), method, **where)
    patch = pl.attach(ours, method).placed[target].patch
    layer = theirs.get_base_model().get_submodule(target.rpartition(".")[0])
    a, b = factors(layer)
    if name == "experts":  # (e·r, i) and (o, r·e)
        e, r, _ = patch.a.shape
        a, b = a.unflatten(0, (e, r)), b.unflatten(1, (r, e)).permute(2, 0, 1)
    with torch.no_grad():
        patch.a.copy_(a)
        patch.b.copy_(b)
        if name == "mha_seq_first":
            layer.get_base_layer().out_proj.lora_B.default.weight.zero_()
    (x,) = kind.batch().values()
    close(ours(x), theirs(x))


@kinds("hf_bert", "hf_gpt2", "hf_llama", "hf_t5", "hf_vit")
def test_the_default_targets_are_all_linear(kind: Kind) -> None:
    """LoRA takes what peft's "all-linear" takes, and ViT's patch embedding, a convolution."""
    method = pl.LoRA(rank=3, alpha=3)
    task = "SEQ_CLS" if kind.name in ("hf_bert", "hf_vit") else None  # peft is told of their heads
    theirs = under_peft(kind.model(), method, target_modules="all-linear", task_type=task)
    taken = {a for a in pl.plan(kind.model(), method).addresses if "patch_embeddings" not in a}
    assert taken == set(layers(theirs))


@kinds("mlp", "hf_llama", "hf_t5")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_begin_and_go_on_as_in_peft(kind: Kind, init: str) -> None:
    """The same BA at first and the same function after the same step, on an untouched base.

    peft rewrites the base (#1929, #2184, #2270).
    """
    method = pl.LoRA(rank=3, alpha=5, init=init, targets=SAME[kind.name][:3])
    theirs, ours = under_peft(kind.model(), method, init_lora_weights=init), kind.model()
    delta = pl.attach(ours, method)
    for placed, layer, _ in pairs(delta, theirs):
        product = placed.patch.b @ placed.patch.a
        close(method.scale * product, layer.get_delta_weight("default"))
    with torch.no_grad():
        for _, _, both in pairs(delta, theirs):
            for _, their in both:
                their.add_(0.1 * torch.randn_like(their))
    copy_factors(delta, theirs)
    close(kind.run(ours, kind.batch()), kind.run(theirs, kind.batch()))
    assert base_bits(ours) == base_bits(kind.model())


def test_olora_takes_transposed_weights() -> None:
    """On transformers' Conv1D, where peft crashes, BA is of the QR of the weight as (o, i)."""
    delta = pl.attach(KIND["conv1d_hf"].model(), pl.LoRA(rank=3, init="olora"))
    placed = delta.placed["0.weight"]
    q, r = torch.linalg.qr(placed.site.whole.mT)
    close(placed.patch.b @ placed.patch.a, q[:, :3] @ r[:3])


def test_a_weight_normed_layer_adds_its_change_after_the_norm() -> None:
    """peft can't wrap a parametrized layer."""
    model, delta, _ = attached("weight_norm", "2")
    patch, base = delta.placed["2.weight"].patch, KIND["weight_norm"].model()[2].weight
    close(model[2].weight, base + patch.b @ patch.a)
    with pytest.raises(pl.PeftliteError, match="remove_parametrizations"):
        pl.merge(model, "a")


# -- choosing


def test_an_exception_in_a_mixed_batch_leaves_no_trace() -> None:
    """peft leaks its hooks, and later plain calls are wrong (#3475)."""
    model, _, run = attached("gpt")
    add(model, "b")
    output = run(b=3)
    failing = mock.Mock(side_effect=[None, KeyboardInterrupt])  # in the second group of rows
    hook = model.blocks[1].mlp[2].register_forward_hook(failing)
    with refused(model, KeyboardInterrupt), pl.using(model, rows=["a", "b", None]):
        run(b=3)
    hook.remove()
    assert torch.equal(run(b=3), output)


def test_another_thread_never_changes_a_call() -> None:
    """In peft another thread's `disable_adapter` corrupts 400 calls of 400 (adapters#165)."""
    model, _, run = attached("mlp")
    add(model, "b")
    done = threading.Event()
    with pl.using(model, "a"):
        expected = run()

    def interfere() -> None:
        while not done.is_set():
            with pl.using(model, None):
                run()
            pl.use(model, "b")
            pl.use(model, None)

    def work() -> None:
        try:
            for _ in range(400):
                with pl.using(model, "a"):
                    assert torch.equal(run(), expected)
        finally:
            done.set()

    in_threads(work, interfere)


def test_no_call_is_torn_between_two_choices() -> None:
    """Another thread chooses halfway through a call: peft goes on with the other adapter."""
    model, _, run = attached("mlp")
    expected = run()
    model[1].register_forward_hook(lambda *_: in_threads(lambda: pl.use(model, None)))
    with pl.using(model, "a"):
        assert torch.equal(run(), expected)


def test_no_choice_changes_what_is_trainable() -> None:
    """peft's `set_adapter` thaws what the user froze (#1374, #2759, #3487, #3580)."""
    model, delta, _ = attached("gpt")
    add(model, "b")
    delta.placed["blocks.0.attn.q_proj.weight"].patch.a.requires_grad_(False)
    model.norm.weight.requires_grad_(True)
    flags = trainable(model)
    for verb in (pl.use, pl.view, pl.merge, pl.unmerge):
        verb(model, "a")
        with pl.using(model, "b"):
            assert trainable(model) == flags


def test_switching_back_and_forth_compiles_once_per_choice() -> None:
    """peft recompiles at every switch, even to an adapter it has compiled (#1199)."""
    model, _, run = attached("mlp")
    add(model, "b")
    torch._dynamo.reset()
    counter = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for name in ("a", "b", None) * 3:
        pl.use(model, name)
        close(run(model=compiled), run())
    assert counter.graphs == 3


def test_a_model_runs_and_trains_on_after_its_last_delta() -> None:
    """peft's next forward raises KeyError('default'), and its `unload` leaves the base frozen."""
    kind = KIND["gpt"]
    model, batch = kind.model(), kind.batch()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    flags, base = trainable(model), kind.run(model, batch)
    add(model, "a")
    pl.detach(model, "a")
    assert torch.equal(kind.run(model, batch), base) and trainable(model) == flags
    add(model, "a")
    output = kind.run(model, batch)
    pl.merge(model, "a", backup="none")
    close(kind.run(model, batch), output)
    assert trainable(model) == flags


# -- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fifty_merges_leave_no_rounding(dtype: torch.dtype) -> None:
    """peft subtracts, and drifts by 0.05 in bf16 (#1388, #2368, #2502)."""
    model, _, _ = attached("hf_llama", base=dtype)
    base = base_bits(model)
    for _ in range(50):
        pl.merge(model, "a")
        assert base_bits(model) != base
        pl.unmerge(model, "a")
    assert base_bits(model) == base


def test_a_merged_delta_stays_merged_until_it_is_told() -> None:
    """peft's `disable_adapter` unmerges for good; a deleted adapter stays in W (#3498)."""
    model, _, run = attached("gpt")
    base = base_bits(model)
    pl.merge(model, "a")
    merged = base_bits(model)
    with pl.using(model, None):
        run()
    pl.use(model, None)
    assert base_bits(model) == merged != base
    pl.detach(model, "a")
    assert base_bits(model) == base


def test_one_bad_layer_stops_the_whole_merge() -> None:
    """peft's `safe_merge` raises with the layers before it merged; the default merges the NaN."""
    model, delta, _ = attached("mlp")
    with torch.no_grad():
        delta.placed["2.weight"].patch.b[0, 0] = float("nan")
    with refused(model, pl.PeftliteError, r"2\.weight infinite or NaN; nothing was merged"):
        pl.merge(model, "a")


@pytest.mark.parametrize("target", ["embed", "lm_head"])
def test_a_tied_tensor_has_one_change_under_both_names(target: str) -> None:
    """A tied head in a plain module: merged and attached differ by 3.5 in peft (#2018)."""
    model, delta, run = attached("gpt_tied", target)
    assert list(delta.placed) == ["embed.weight"]
    output = run()
    close(model.lm_head(torch.eye(WIDTH)).mT, model.embed(torch.arange(VOCAB)))
    pl.merge(model, "a")
    close(run(), output)
    assert model.embed._parameters["weight"] is model.lm_head._parameters["weight"]


@pytest.mark.parametrize("target", ["first", "second"])
def test_a_module_under_two_names_changes_under_both(target: str) -> None:
    """peft wraps it under one of them only."""
    model, delta, run = attached("shared", target)
    assert list(delta.placed) == ["first.weight"] and delta.num_parameters == 2 * (WIDTH + WIDTH)
    (x,), weight, bias = KIND["shared"].batch().values(), model.second.weight, model.second.bias
    x = F.gelu(F.linear(F.gelu(model.up(x)), weight, bias))
    close(run(), model.head(F.gelu(F.linear(x, weight, bias))))


@pytest.mark.parametrize("asked, kept", [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_a_half_precision_base_stays_one(asked: torch.dtype | None, kept: torch.dtype) -> None:
    """fp32 factors by default, others if asked; outputs in the base's dtype (#1090, #2421)."""
    _, delta, run = attached("hf_llama", SAME["hf_llama"], torch.bfloat16, dtype=asked)
    output = run()
    output.float().square().mean().backward()
    assert output.dtype is torch.bfloat16
    assert {(p.dtype, p.grad.dtype) for p in delta.parameters()} == {(kept, kept)}


# -- attention, convolutions and other tensors

PARTS = [
    ("mha_seq_first", "attn.in_proj_weight[q]", "attn.in_proj_weight", (0, 16)),
    ("mha_seq_first", "attn.in_proj_weight[k]", "attn.in_proj_weight", (16, 32)),
    ("mha_seq_first", "attn.in_proj_weight[v]", "attn.in_proj_weight", (32, 48)),
    ("mha_seq_first", "attn.out_proj", "attn.out_proj.weight", (0, 16)),
    ("mha_decoder", "cross_attn.k_proj_weight", "cross_attn.k_proj_weight", (0, 16)),
    ("gpt_fused", "blocks.0.attn.qkv.weight[v]", "blocks.0.attn.qkv.weight", (24, 36)),
    ("hf_gpt2", "h.1.attn.c_attn.weight[q]", "transformer.h.1.attn.c_attn.weight", (0, 16)),
]
NAMED = [
    *(("experts", "w_out"), ("raw", "scale_matrix"), ("lstm", "rnn.weight_ih_l1_reverse")),
    *(("gru", "rnn"), ("gru", "cell"), ("bilinear", "bilinear")),
    *(("conv_transpose", "up2d"), ("embedding_bag", "0")),
]


def assert_alive(name: str, delta: pl.Delta, output: Tensor) -> None:
    """Every parameter of the delta has an effect."""
    kind = KIND[name]
    assert not torch.allclose(output, kind.run(kind.model(), kind.batch()))
    output.square().mean().backward()
    assert all(p.grad.any() for p in delta.parameters())


@pytest.mark.parametrize("name, target, tensor, outputs", PARTS, ids=[p[1] for p in PARTS])
def test_a_part_changes_alone(name: str, target: str, tensor: str, outputs: tuple) -> None:
    """q, k, v and out of an attention, with kdim too (#761, #852, #2200).

    peft takes an nn.MultiheadAttention whole or not at all, refuses kdim, has no slices, and
    leaves `out_proj` alone without effect.
    """
    model, delta, run = attached(name, target)
    assert_alive(name, delta, run())
    pl.merge(model, "a")
    now, base = dict(model.named_parameters()), dict(KIND[name].model().named_parameters())
    assert [n for n in base if not torch.equal(base[n], now[n])] == [tensor]
    changed = (base[tensor] != now[tensor]).any(dim=0 if name == "hf_gpt2" else 1)  # it is (i, o)
    assert changed.nonzero().flatten().tolist() == list(range(*outputs))


@pytest.mark.parametrize("name, target", NAMED)
def test_any_tensor_can_be_named_and_none_is_dead(name: str, target: str) -> None:
    """peft refuses these as modules, and a parameter of the root even as a parameter."""
    _, delta, run = attached(name, target)
    assert all(address.startswith(target) for address in delta.placed)
    assert_alive(name, delta, run())


def test_attention_in_bf16_never_drifts() -> None:
    """peft merges at every call, and after 50 the frozen base is off by 3.4e-3."""
    model, _, run = attached("mha_seq_first", "attn", torch.bfloat16)
    base, first = base_bits(model), run()
    assert all(torch.equal(run(), first) for _ in range(50))
    assert base_bits(model) == base


def test_attention_applies_dropout() -> None:
    """peft leaves `lora_dropout` out of an nn.MultiheadAttention."""
    model, _, run = attached("mha_seq_first", "attn.in_proj_weight", dropout=0.5)
    calm = run()
    assert torch.equal(run(), calm)
    model.train()
    first, second = run(), run()
    assert not torch.allclose(first, second) and not torch.allclose(first, calm)


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": "same", "dilation": 2},
        {"groups": 2, "stride": 2},
        {"groups": 4, "padding": (2, 1), "dilation": (2, 1), "padding_mode": "circular"},
    ],
    ids=str,
)
def test_a_convolution_merges_as_it_runs(settings: dict) -> None:
    """peft is off by 2.4 for reflect and 7.4 for dilated "same", and can't merge groups (#3697)."""
    model, x = nn.Sequential(nn.Conv2d(4, 8, 3, **settings)), torch.randn(2, 4, 9, 8)
    add(model, "a", "0", rank=3, alpha=6)
    output = model(x)
    pl.merge(model, "a", backup="none")
    assert type(model[0]) is nn.Conv2d
    close(model(x), output)


# -- targets and names


@pytest.mark.parametrize("language", [{"targets": ["q_proj", "v_porj"]}, {"exclude": "v_porj"}])
def test_a_typo_is_an_error_beside_a_match(language: dict) -> None:
    """peft adapts `q_proj` and says nothing (#1959, #3554, #3693)."""
    model = KIND["gpt"].model()
    with refused(model, pl.TargetError, r"'v_porj' matches nothing; nearest: .*'v_proj'"):
        pl.attach(model, pl.LoRA(**language))


def test_the_root_may_be_a_list_of_modules() -> None:
    """peft finds no target in a root ModuleList (#3610)."""
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    assert list(add(model, "a", "1").placed) == ["1.weight"]


def test_no_name_confuses_a_file(tmp_path: Path) -> None:
    """Modules called "weight" (#2772) or "base_layer", an adapter called "lora" (#2699)."""
    names = ("weight", "lora_A", "base_layer", "default")
    model = nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in names))
    fresh, x = copy.deepcopy(model), torch.randn(3, 4)
    pl.save(add(model, "lora", list(names)), tmp_path / "lora.safetensors")
    pl.load(fresh, tmp_path / "lora.safetensors")
    assert torch.equal(fresh(x), model(x)) and list(pl.deltas(fresh)) == ["lora"]


# -- the base, and the libraries that work on it


class Double(ModelHook):
    """Doubles what a module gives, by accelerate's override of `module.forward`."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 2 * output


@pytest.mark.parametrize(
    "order",
    [
        "hook attach unhook detach",
        "hook attach detach unhook",
        "attach hook unhook detach",
        "attach hook detach attach detach unhook",
    ],
)
def test_accelerate_and_a_delta_come_and_go_in_any_order(order: str) -> None:
    """Its hooks replace `module.forward`, and keep the one that was there."""
    kind = KIND["mlp"]

    def attach(model: nn.Module) -> None:
        with seeded(1):
            add(model, "a")

    def expected(hooked: bool, changed: bool) -> Tensor:
        model = kind.model()
        for module in model if hooked else ():
            module.register_forward_hook(lambda module, args, output: 2 * output)
        if changed:
            attach(model)
        return kind.run(model, kind.batch())

    steps = {
        "attach": attach,
        "detach": lambda model: pl.detach(model, "a"),
        "hook": lambda model: [add_hook_to_module(module, Double()) for module in model],
        "unhook": lambda model: [remove_hook_from_module(module) for module in model],
    }
    model, state = kind.model(), {"hook": False, "tach": False}
    for step in order.split():
        steps[step](model)
        state[step[-4:]] ^= True
        close(kind.run(model, kind.batch()), expected(*state.values()))


@pytest.mark.parametrize("method", [pl.BitFit(), pl.FullTuning(), pl.LoRA(targets="*weight_orig")])
@pytest.mark.parametrize(
    "normed",
    [nn.utils.spectral_norm, lambda module: prune.l1_unstructured(module, "weight", 0.5)],
    ids=["spectral_norm", "prune"],
)
def test_a_weight_that_a_hook_computes(normed: Callable, method: pl.Method) -> None:
    """The old spectral_norm and pruning keep `weight` as a plain attribute: beside it all works."""
    model = nn.Sequential(normed(nn.Linear(6, 6)), nn.Linear(6, CLASSES)).eval()
    x = torch.randn(3, 6)
    base = model(x)
    disturb(pl.attach(model, method))
    output = model(x)
    assert not torch.allclose(output, base)
    pl.merge(model, "default")
    close(model(x), output)
    pl.detach(model, "default")
    assert torch.equal(model(x), base)


EMBEDDINGS = {
    "hf_bert": "bert.embeddings.word_embeddings",
    "hf_gpt2": "transformer.wte",
    "hf_llama": "model.embed_tokens",
    "hf_t5": "shared",
}
text = pytest.mark.parametrize("name", EMBEDDINGS)


@pytest.mark.parametrize("where", ["inside", "embeddings"])
@text
def test_transformers_saves_the_base_as_it_was(name: str, where: str, tmp_path: Path) -> None:
    """`save_pretrained` of an attached model holds the base, which peft's renamed keys don't.

    transformers 4 refuses where a patched module has several names, as T5's embedding does.
    """
    model, _, run = attached(name, EMBEDDINGS[name] if where == "embeddings" else None)
    try:
        model.save_pretrained(tmp_path)
    except RuntimeError as error:
        assert name == "hf_t5" and "shared tensors" in str(error)
        return
    again = type(model).from_pretrained(tmp_path).eval()
    pl.use(model, None)
    close(run(model=again), run())


@text
def test_resized_embeddings_keep_every_delta_or_say_no(name: str, tmp_path: Path) -> None:
    """peft drops embeddings from its targets or saves them unasked (#2092, #3585)."""
    model, _, run = attached(name)
    output = run()
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    close(run()[..., : output.shape[-1]], output)

    model, delta, _ = attached(name, EMBEDDINGS[name])
    with refused(model, pl.PeftliteError, r"pl\.detach"):
        model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    pl.use(model, None)
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    for verb in (lambda: pl.merge(model, "a"), lambda: pl.save(delta, tmp_path / "a")):
        with pytest.raises(pl.PeftliteError, match=r"pl\.detach"):
            verb()


def test_a_replaced_module_does_not_lose_its_delta_in_silence() -> None:
    """A new head in place of the patched one: the delta is nowhere, and merging it is an error."""
    model, _, _ = attached("gpt", "lm_head")
    model.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
    with pytest.raises(pl.PeftliteError, match=r"lm_head\.weight"):
        pl.merge(model, "a")


@pytest.mark.parametrize("name", ["hf_gpt2", "hf_t5"])
def test_tying_again_keeps_the_delta(name: str) -> None:
    """`tie_weights` hands one module's weight, as it reads it, to another."""
    model, delta, run = attached(name, EMBEDDINGS[name])
    output, (placed,) = run(), delta.placed.values()
    model.tie_weights()
    assert len({id(module._parameters[slot]) for module, slot in placed.site.owners}) == 1
    assert torch.equal(run(), output)
    pl.merge(model, "a")
    close(run(), output)


def test_tying_anew_is_an_error() -> None:
    """A delta on an untied embedding can't say what a head tied to it later should be."""
    model, _, _ = attached("hf_llama", "embed_tokens")
    model.config.tie_word_embeddings = True
    with pytest.raises((TypeError, pl.PeftliteError)):
        model.tie_weights()  # transformers 4 assigns the weight as read, which torch refuses
        pl.merge(model, "a")


def test_parameters_are_found_by_name() -> None:
    """`get_parameter`, which transformers 5 ties by, gives the base's own."""
    model, _, _ = attached("mlp")
    for name, parameter in KIND["mlp"].model().named_parameters():
        assert torch.equal(model.get_parameter(name).data, parameter)


# -- files

MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop("0.weight:a"), "no 0.weight:a"),
    "unexpected": (lambda t: t.update({"9.weight:a": torch.ones(2)}), "nothing asks for"),
    "renamed": (lambda t: t.update({"0.weight:A": t.pop("0.weight:a")}), "no 0.weight:a"),
    "of the base": (lambda t: t.update({"0.weight": torch.ones(2)}), "nothing asks for"),
    "shape": (lambda t: t.update({"0.weight:a": torch.ones(3, 10)}), r"\(3, 10\)"),
    "integers": (lambda t: t.update({"0.weight:a": t["0.weight:a"].long()}), "int64"),
}


@pytest.mark.parametrize("change, message", MISFITS.values(), ids=MISFITS)
def test_a_misfit_loads_nothing(change: Callable, message: str, tmp_path: Path) -> None:
    """peft loads all of these but the shape, at most with a warning (#1932, #2118, #2699, #3548).

    At the shape it leaves the base wrapped and frozen; a tensor of the base it overwrites.
    """
    model, delta, _ = attached("mlp")
    tensors = delta.state_dict()
    change(tensors)
    with mock.patch.object(delta, "saved", lambda: tensors):
        pl.save(delta, tmp_path / "a.safetensors")
    model = KIND["mlp"].model()
    with refused(model, pl.FileError, message):
        pl.load(model, tmp_path / "a.safetensors")


def test_a_file_holds_the_delta_and_nothing_else(tmp_path: Path) -> None:
    """peft saves embeddings unasked (#2092), or leaves them out (#3585)."""
    _, delta, _ = attached("hf_llama", SAME["hf_llama"])
    pl.save(delta, tmp_path / "a.safetensors")
    addresses = {key.rpartition(":")[0] for key in load_file(tmp_path / "a.safetensors")}
    assert addresses == set(delta.placed) >= {"model.embed_tokens.weight", "lm_head.weight"}
