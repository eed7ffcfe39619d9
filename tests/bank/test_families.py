"""Families: a batch of many deltas equals each row run alone, whatever the deltas are made by."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftlite as pl
from peftlite.bank import DeltaBank
from tests.zoo import HIDDEN, KINDS, VOCAB, WIDTH, Kind, floats, seeded

ZOO = {kind.name: kind for kind in KINDS}
Methods = pl.Method | Sequence[pl.Method]


@dataclass(frozen=True)
class Family:
    """Deltas that a bank with such a room mixes, and the models to do it on."""

    name: str
    room: Methods
    deltas: Sequence[Methods]
    kinds: str
    exact: bool = True  # whether the base's rows keep every bit

    def __str__(self) -> str:
        return self.name


def adapters(preset: str, **options: Any) -> list[pl.Method]:
    sizes = {2: "relu", 5: "gelu", 1: "silu", 3: "tanh"}
    return [
        pl.BottleneckAdapter(preset, bottleneck_size=r, activation=f, init="normal", **options)  # type: ignore
        for r, f in sizes.items()
    ]


HEADS = lambda site: site.linear  # noqa: E731
MAPS = "mlp gpt hf_gpt2 hf_t5"
BLOCKS = "gpt hf_llama hf_bert hf_t5"
INPUTS = pl.IA3(feedforward=True)
PROMPTS = [pl.PromptTuning(prompt_length=3), pl.PromptTuning(prompt_length=1),
           pl.PTuning(prompt_length=2), pl.PTuning(prompt_length=2, encoder="lstm")]  # fmt: skip
MAM = [pl.PrefixTuning(prefix_length=4), pl.BottleneckAdapter("parallel", bottleneck_size=3)]


def each(given: Methods) -> list[pl.Method]:
    return [given] if isinstance(given, pl.Method) else list(given)


FAMILIES = [
    Family("lora", pl.LoRA(), [pl.LoRA(rank=r, alpha=3) for r in (1, 8, 3, 5)], MAPS),
    Family("low_rank", pl.LoRA(), [
        pl.VeRA(rank=8), pl.VBLoRA(rank=2, num_vectors=8, vector_length=4),
        pl.AdaLoRA(total_steps=5, init_rank=5, target_rank=2), pl.LoRA(rank=3, init="pissa"),
    ], MAPS),
    Family("dora", pl.DoRA(), [pl.DoRA(rank=r) for r in (1, 8, 3, 2)], "mlp hf_gpt2 hf_llama"),
    Family("embedding", pl.LoRA(targets="embed"),
           [pl.LoRA(rank=r, targets="embed") for r in (1, 4, 2, 3)], "gpt embedding"),
    Family("conv", pl.LoRA(), [pl.LoRA(rank=r, alpha=3) for r in (1, 8, 3, 5)],
           "conv1d conv2d_grouped conv2d_same conv3d conv_transpose"),
    Family("ia3", pl.IA3(), [pl.IA3()] * 4, MAPS),
    Family("ia3_inputs", [INPUTS, pl.IA3()], [INPUTS, pl.IA3()] * 2, MAPS),
    Family("bitfit", pl.BitFit(add_missing=True), [pl.BitFit(add_missing=True)] * 4,
           "mlp gpt norms conv1d hf_llama hf_bert hf_t5 hf_vit"),
    Family("norm", pl.NormTuning(), [pl.NormTuning()] * 4, "gpt hf_llama hf_bert hf_t5 hf_vit"),
    Family("dense", pl.FullTuning(targets=HEADS), [
        pl.LoHa(rank=2, targets=HEADS), pl.LoKr(rank=2, targets=HEADS),
        pl.OFT(block_size=2, targets=HEADS), pl.FullTuning(targets=HEADS),
        pl.HRA(rank=2, targets=HEADS), pl.Gated(pl.LoRA(rank=2, targets=HEADS))], "mlp gpt"),
    Family("sparse", pl.SHiRA(rank=4), [
        pl.SHiRA(rank=1), pl.SparseMask(fraction=0.1, select="random"),
        pl.SparseMask(fraction=0.02), pl.SHiRA(rank=2)], MAPS),
    Family("houlsby", pl.BottleneckAdapter(bottleneck_size=5), adapters("houlsby"),
           BLOCKS + " hf_vit"),
    Family("parallel", pl.BottleneckAdapter("parallel", bottleneck_size=5), adapters("parallel"),
           "gpt hf_llama hf_t5"),
    Family("pfeiffer", pl.BottleneckAdapter("pfeiffer", bottleneck_size=5), adapters("pfeiffer"),
           "hf_bert"),
    Family("convolved", pl.BottleneckAdapter(bottleneck_size=5, targets="0()"),
           adapters("houlsby", targets="0()"), "mlp conv1d"),
    Family("compacter", pl.Compacter(bottleneck_size=12),
           [pl.Compacter(bottleneck_size=r, init="glorot") for r in (4, 8, 12, 4)], BLOCKS),
    Family("loreft", pl.LoReFT(rank=3, positions="f1"), [
        pl.LoReFT(rank=2), pl.LoReFT(rank=1, positions="f1"),
        pl.LoReFT(rank=3, positions="f2+l1"), pl.LoReFT(rank=3, positions="l2")], BLOCKS),
    Family("prefix", pl.PrefixTuning(prefix_length=5), [
        *(pl.PrefixTuning(prefix_length=n) for n in (5, 2, 1)),
        pl.PrefixTuning(prefix_length=3, reparametrize=True, hidden_size=4)],
        "gpt hf_llama hf_bert hf_vit hf_t5 mha_encoder mha_decoder", exact=False),
    Family("prompt", pl.PromptTuning(prompt_length=4), PROMPTS,
           "hf_llama hf_bert hf_gpt2 hf_t5", exact=False),
    Family("mam", [*MAM, pl.LoRA(), pl.BitFit(add_missing=True)], [
        MAM, [pl.LoRA(rank=2), pl.BitFit(add_missing=True)], pl.LoRA(rank=8),
        [pl.PrefixTuning(prefix_length=1), pl.LoRA(rank=3)]], "gpt hf_llama", exact=False),
    Family("adapter_and_bias", [pl.BottleneckAdapter(bottleneck_size=5), pl.BitFit()], [
        [pl.BitFit(), pl.BottleneckAdapter(bottleneck_size=3, init="normal")], pl.BitFit(),
        *adapters("houlsby")[:2]], "gpt hf_bert"),
]  # fmt: skip

READERS = "mha_encoder mha_decoder lstm gru bilinear experts"
MATRICES = lambda site: not site.is_call and site.whole.dim() > 1 and not site.head  # noqa: E731

# where weights are read, and rows go through by their deltas
READ = [
    Family("read_low_rank", pl.LoRA(targets=MATRICES), [
        *(pl.LoRA(rank=r, alpha=3, targets=MATRICES) for r in (1, 8)),
        pl.AdaLoRA(total_steps=5, init_rank=5, target_rank=2, targets=MATRICES)],
        READERS, exact=False),
    Family("read_dense", [pl.FullTuning(), pl.DoRA(targets=MATRICES)], [
        pl.FullTuning(), pl.BitFit(), pl.DoRA(rank=2, targets=MATRICES)], READERS, exact=False),
    Family("experts_and_more", [pl.LoRA(targets=["w_in", "router"]), pl.BitFit()], [
        pl.LoRA(rank=2, targets="w_in"), [pl.LoRA(rank=3, targets="router"), pl.BitFit()],
        pl.LoRA(rank=2, targets="w_in[1:3]")], "experts", exact=False),
]  # fmt: skip

FIRST = {family.name: family for family in FAMILIES if "gpt" in family.kinds.split()}
EVERYTHING = Family(
    "everything",
    [method for family in FIRST.values() for method in each(family.room)],
    [family.deltas[1] for family in FIRST.values()],
    "gpt",
    exact=False,
)

CELLS = [
    (family, kind) for family in (*FAMILIES, *READ, EVERYTHING) for kind in family.kinds.split()
]
COMPILED = [(EVERYTHING, "gpt"), *((f, "hf_llama") for f in FAMILIES if f.name == "prompt")]
ONE_OF_EACH = [(family, family.kinds.split()[0]) for family in FAMILIES]


def delta(model: nn.Module, methods: Methods, name: str) -> pl.Delta:
    """A delta whose every parameter changes something, the same ones each time."""
    made = pl.attach(model, methods, name=name)
    with seeded(int(name[1:])), torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def bank_of(model: nn.Module, family: Family, made: Sequence[pl.Delta]) -> DeltaBank:
    bank = DeltaBank(model, len(made), 8, family.room)
    for each in made:
        bank.load(each.name, each)
    return bank


def banked(
    family: Family, kind: Kind, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, DeltaBank, nn.Module]:
    """A model with a bank that has a family's deltas, and its twin that has them attached."""
    twin, model = kind.model(dtype), kind.model(dtype)
    made = [delta(twin, methods, f"d{i}") for i, methods in enumerate(family.deltas)]
    return model, bank_of(model, family, made), twin


def names_of(family: Family) -> list[str | None]:
    return [None, *(f"d{i}" for i in range(len(family.deltas))), "d0"]


def each_alone(kind: Kind, twin: nn.Module, names: Sequence[str | None], batch: Any) -> Tensor:
    """What each row gives by itself, with its delta attached."""
    rows = []
    for row, name in enumerate(names):
        with pl.using(twin, name):
            rows.append(kind.run(twin, {k: v[row : row + 1] for k, v in batch.items()}))
    return torch.cat(rows)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(("family", "kind"), CELLS, ids=str)
@torch.no_grad()
def test_a_mixed_batch_equals_each_row_alone(family: Family, kind: str) -> None:
    model, bank, twin = banked(family, ZOO[kind])
    names = names_of(family)
    batch = ZOO[kind].batch(len(names))
    plain, wanted = ZOO[kind].run(model, batch), each_alone(ZOO[kind], twin, names, batch)
    with bank.rows(names):
        mixed = ZOO[kind].run(model, batch)
    assert_close(mixed, wanted)
    for row, name in enumerate(names):
        moved = not torch.allclose(mixed[row], plain[row], atol=1e-3)
        assert moved if name else not moved
        assert name or not family.exact or torch.equal(mixed[row], plain[row])


@pytest.mark.parametrize(
    ("family", "kind"), [*((f, k) for f, k in ONE_OF_EACH if k != "hf_bert"), (EVERYTHING, "gpt")],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_whatever_the_default_device(family: Family, kind: str) -> None:
    twin, model, names = ZOO[kind].model(), ZOO[kind].model(), names_of(family)
    made = [delta(twin, methods, f"d{i}") for i, methods in enumerate(family.deltas)]
    batch = ZOO[kind].batch(len(names))
    wanted = each_alone(ZOO[kind], twin, names, batch)
    with torch.device("meta"), bank_of(model, family, made).rows(names):
        mixed = ZOO[kind].run(model, batch)
    assert_close(mixed, wanted)


def compiled(family: Family, kind: str, backend: str) -> None:
    """Compiled once, it gives the same for every mix."""
    model, bank, twin = banked(family, ZOO[kind])
    names = names_of(family)
    batch = ZOO[kind].batch(len(names))
    torch.compiler.reset()
    fn = torch.compile(model, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for mix in (names, names[::-1], [None] * len(names)):
            with bank.rows(mix):
                got = ZOO[kind].output(fn(**batch))
            assert_close(got, each_alone(ZOO[kind], twin, mix, batch))


@pytest.mark.heavy
@pytest.mark.parametrize(("family", "kind"), COMPILED, ids=str)
@torch.no_grad()
def test_compiled_once_for_every_mix(family: Family, kind: str) -> None:
    compiled(family, kind, "eager")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), ONE_OF_EACH, ids=str)
@torch.no_grad()
def test_compiled_by_inductor(family: Family, kind: str) -> None:
    compiled(family, kind, "inductor")


TRAINED = [
    Family("lora", pl.LoRA(), [pl.LoRA(rank=r) for r in (1, 8, 3)], "gpt"),
    Family("conv", pl.LoRA(), [pl.LoRA(rank=r) for r in (1, 8, 3)],
           "conv2d_grouped conv_transpose"),
    Family("ia3", [pl.IA3(targets="up_proj"), pl.IA3(targets="down_proj", feedforward=True)],
           [pl.IA3(targets="up_proj"), pl.IA3(targets="down_proj", feedforward=True)], "hf_llama"),
    Family("bitfit", pl.BitFit(add_missing=True), [pl.BitFit(), pl.BitFit(add_missing=True)],
           "gpt"),
    Family("norm", pl.NormTuning(), [pl.NormTuning()] * 2, "gpt hf_llama"),
    Family("dense", pl.FullTuning(targets=HEADS), [pl.FullTuning(targets=HEADS)] * 2, "mlp"),
    Family("embedding", pl.LoRA(targets="embed"),
           [pl.LoRA(rank=r, targets="embed") for r in (4, 2)], "embedding"),
    Family("sparse", pl.SHiRA(rank=3), [pl.SHiRA(rank=1), pl.SparseMask(fraction=0.02)], "gpt"),
    Family("adapters", pl.BottleneckAdapter(bottleneck_size=5), adapters("houlsby"), "gpt"),
    Family("prefix", pl.PrefixTuning(prefix_length=5),
           [pl.PrefixTuning(prefix_length=n) for n in (5, 2)], "gpt"),
    Family("prompt", pl.PromptTuning(prompt_length=4),
           [pl.PromptTuning(prompt_length=n) for n in (4, 2)], "hf_llama"),
    Family("mam", [*MAM, pl.LoRA()], [MAM, pl.LoRA(rank=2)], "gpt"),
    replace(READ[0], deltas=READ[0].deltas[:2]),
    Family("read_dense", pl.FullTuning(), [pl.FullTuning(), pl.BitFit()], "mha_encoder lstm"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "kind"), [(f, kind) for f in TRAINED for kind in f.kinds.split()], ids=str
)
def test_each_row_trains_its_own_delta_as_it_would_alone(family: Family, kind: str) -> None:
    model, bank, twin = banked(family, ZOO[kind], torch.float64)
    names = names_of(family)
    batch = ZOO[kind].batch(len(names), torch.float64)
    close = 1e-6 if kind.startswith("hf") else 1e-9  # transformers has its norms in fp32
    with bank.train(names):
        ZOO[kind].run(model, batch).square().sum().backward()
    each_alone(ZOO[kind], twin, names, batch).square().sum().backward()
    for name, made in pl.deltas(twin).items():
        wanted = by_site(made.named_parameters())
        found = by_site(bank.named_parameters(name))
        assert list(found) == list(wanted)
        size = max(float(grad.abs().max()) for grads in wanted.values() for grad in grads)
        for address, grads in wanted.items():
            for grad, own in zip(grads, found[address], strict=True):
                torch.testing.assert_close(own, grad, rtol=0, atol=close * size)
    assert all(p.grad is None for p in model.parameters())


def by_site(named: Any) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for name, parameter in named:
        found.setdefault(name.rpartition(":")[0], []).append(parameter.grad)
    return found


@pytest.mark.parametrize("family", TRAINED, ids=str)
def test_what_was_trained_comes_back(family: Family) -> None:
    kind = ZOO[family.kinds.split()[0]]
    _, bank, twin = banked(family, kind)
    for name, made in pl.deltas(twin).items():
        again = bank.delta(name).state_dict()
        assert list(again) == list(made.state_dict())
        assert all(torch.equal(again[key], value) for key, value in made.state_dict().items())


MIXED = next(family for family in FAMILIES if family.name == "mam")
ROWS = 4


@pytest.fixture(scope="module")
def mixing() -> tuple[nn.Module, DeltaBank, Any, dict[str | None, Tensor]]:
    """A bank of several families, and what every row of a batch gives with each of its deltas."""
    kind = ZOO["gpt"]
    model, bank, twin = banked(MIXED, kind)
    batch = kind.batch(ROWS)
    with torch.no_grad():
        of = {name: each_alone(kind, twin, [name] * ROWS, batch) for name in names_of(MIXED)}
    return model, bank, batch, of


@given(st.lists(st.sampled_from(names_of(MIXED)), min_size=ROWS, max_size=ROWS))
@torch.no_grad()
def test_any_mix(mixing: Any, names: list[str | None]) -> None:
    model, bank, batch, of = mixing
    with bank.rows(names):
        mixed = ZOO["gpt"].run(model, batch)
    assert_close(mixed, torch.stack([of[name][row] for row, name in enumerate(names)]))


@given(st.lists(st.sampled_from(names_of(MIXED)), min_size=ROWS // 2, max_size=ROWS // 2))
@torch.no_grad()
def test_a_name_stands_for_the_rows_made_of_its_own(mixing: Any, names: list[str | None]) -> None:
    model, bank, batch, of = mixing
    with bank.rows(names, repeat=2):
        mixed = ZOO["gpt"].run(model, batch)
    each = [name for name in names for _ in range(2)]
    assert_close(mixed, torch.stack([of[name][row] for row, name in enumerate(each)]))


def llama() -> nn.Module:
    """With a cache, and places for long prompts."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


GENERATED = [
    Family("prompt", pl.PromptTuning(prompt_length=20), [
        pl.PromptTuning(prompt_length=5), pl.PromptTuning(prompt_length=20), pl.PTuning(7)], ""),
    Family("loreft", pl.LoReFT(rank=4, positions="f1"),
           [pl.LoReFT(rank=4), pl.LoReFT(rank=2, positions="f2+l1")], ""),
    Family("mam", [*MAM, pl.LoRA(), pl.BitFit(add_missing=True), pl.NormTuning()], [
        MAM, [pl.LoRA(rank=2), pl.BitFit(add_missing=True)], pl.NormTuning()], ""),
]  # fmt: skip


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", GENERATED, ids=str)
def test_rows_keep_their_delta_through_a_decode(family: Family, beams: int) -> None:
    model, bank, twin = banked(family, Kind("llama", llama, floats()))
    names = names_of(family)
    ids = torch.randint(1, VOCAB, (len(names), 7))
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[-1, :3] = 0
    how = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    with bank.rows(names):
        mixed: Any = model.generate(ids, attention_mask=mask, **how)
    for row, name in enumerate(names):
        with pl.using(twin, name):
            one = twin.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **how)
        assert torch.equal(mixed[row], one[0])


@torch.no_grad()
def test_embeddings_in_place_of_ids_have_the_prompts_too() -> None:
    family, kind = next(f for f in FAMILIES if f.name == "prompt"), ZOO["hf_llama"]
    model, bank, twin = banked(family, kind)
    names = names_of(family)
    batch = {"inputs_embeds": torch.randn(len(names), 5, WIDTH)}
    with bank.rows(names):
        mixed = kind.run(model, batch)
    assert_close(mixed, each_alone(kind, twin, names, batch))


@torch.no_grad()
def test_each_row_may_say_where_loreft_intervenes() -> None:
    family, kind = next(f for f in FAMILIES if f.name == "loreft"), ZOO["hf_llama"]
    model, bank, twin = banked(family, kind)
    names = names_of(family)
    at = torch.rand(len(names), 6) < 0.5
    batch = {**kind.batch(len(names)), "reft_positions": at}
    with bank.rows(names):
        mixed = kind.run(model, batch)
    assert_close(mixed, each_alone(kind, twin, names, batch))


PARTS = ["qkv.weight[q]", "qkv.weight[v]"]


@pytest.mark.parametrize(
    "method",
    [pl.LoRA(rank=3), pl.DoRA(rank=3), pl.SHiRA(rank=3), pl.IA3(), pl.FullTuning()],
    ids=lambda method: type(method).__name__,
)
@torch.no_grad()
def test_changes_of_parts_of_a_weight(method: pl.Method) -> None:
    parts = [replace(method, targets=to) for to in (PARTS, PARTS[1], "qkv.weight")]
    room = replace(method, rank=6) if hasattr(method, "rank") else method
    family = Family("parts", replace(room, targets="qkv.weight"), parts, "")
    model, bank, twin = banked(family, ZOO["gpt_fused"])
    names = names_of(family)
    batch = ZOO["gpt_fused"].batch(len(names))
    with bank.rows(names):
        mixed = ZOO["gpt_fused"].run(model, batch)
    assert_close(mixed, each_alone(ZOO["gpt_fused"], twin, names, batch))


@pytest.mark.parametrize(("family", "kind"), ONE_OF_EACH, ids=str)
@torch.no_grad()
def test_half_precision(family: Family, kind: str) -> None:
    model, bank, twin = banked(family, ZOO[kind], torch.bfloat16)
    names = names_of(family)
    batch = ZOO[kind].batch(len(names), torch.bfloat16)
    with bank.rows(names):
        mixed = ZOO[kind].run(model, batch)
    wanted = each_alone(ZOO[kind], twin, names, batch)
    assert mixed.dtype == wanted.dtype and (mixed - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("method", [pl.LTSFT(steps=1, fraction=0.1), pl.DiffPruning(steps=1)])
@torch.no_grad()
def test_entries_that_training_found(method: Any) -> None:
    kind, twin, model = ZOO["mlp"], ZOO["mlp"].model(), ZOO["mlp"].model()
    made = delta(twin, method, "d0")
    made.step()
    for parameter in made.parameters():
        parameter.add_(0.3)
    bank = DeltaBank(model, 1, 1, replace(method, fraction=0.3))  # a site may have more than others
    bank.load("d0", made)
    batch = kind.batch()
    with bank.rows(["d0", None]):
        mixed = kind.run(model, batch)
    assert_close(mixed, each_alone(kind, twin, ["d0", None], batch))


@torch.no_grad()
def test_what_is_refused_leaves_no_trace() -> None:
    model = ZOO["gpt"].model()
    bank = DeltaBank(model, 2, 4, [pl.LoRA(rank=4), *MAM])
    bank.load("d0", MAM)
    before = [buffer.clone() for buffer in bank._arena.buffers]
    for method in (pl.LoRA(rank=5), pl.PrefixTuning(prefix_length=9), pl.BitFit()):
        with pytest.raises(pl.PeftliteError):
            bank.load("d0", method)
    assert all(map(torch.equal, before, bank._arena.buffers))
    with bank.use("d0"):
        model(**ZOO["gpt"].batch())
