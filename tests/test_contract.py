"""The contract: every method × every kind of model × every law.

A new method joins with one row in METHODS and inherits every law on every kind. A cell that can't
hold names the error that it raises instead.
"""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftlite as pl
from peftlite.core import host
from peftlite.methods.features import of_layer
from tests.digest import assert_same, bits, digest
from tests.zoo import KINDS, Kind, seeded

FUSED = ["qkv.weight[q]", "qkv.weight[v]"]


@dataclass(frozen=True)
class Row:
    """A method in the contract: how it is attached, and where it can't be."""

    name: str
    method: pl.Method | list[pl.Method]
    refused: dict[str, str] = field(default_factory=dict)  # kind: what the TargetError says
    only: tuple[str, ...] = ()  # the kinds it is for, where it names sites that others lack
    fresh: bool = True  # whether a fresh delta changes nothing, as far as the definition allows it


def anywhere(site: pl.Site) -> bool:
    return True


def called(site: pl.Site) -> bool:
    """Whether a call is made, and what it gives is read."""
    return site.address not in ("bert()", "shared()")


def layers(site: pl.Site) -> bool:
    return of_layer(site.module) is not None


NO_IDS = {
    kind: "takes the one call of a module that looks up its token ids in an nn.Embedding"
    for kind in (
        "mlp mha_encoder mha_decoder mha_seq_first shared experts raw bilinear conv1d "
        "conv2d_grouped conv2d_same conv3d conv_transpose embedding_bag lstm gru weight_norm "
        "conv1d_hf norms hf_vit"
    ).split()
}

NO_ATTENTION = {
    kind: "PrefixTuning takes none of this model's sites by default"
    for kind in (
        "mlp shared experts raw bilinear conv1d conv2d_grouped conv2d_same conv3d conv_transpose "
        "embedding embedding_bag lstm gru weight_norm conv1d_hf norms".split()
        + ["hf_t5"] * transformers.__version__.startswith("4.")  # whose attention calls no SDPA
    )
}

METHODS = (
    Row("lora", pl.LoRA(rank=3, alpha=5)),
    Row("lora_anywhere", pl.LoRA(rank=2, scaling="rslora", targets=anywhere)),
    Row(
        "lora_fa",
        pl.LoRA(rank=3, freeze_a=True, targets=anywhere),
        only=("mlp", "embedding", "experts", "conv2d_grouped", "conv1d_hf"),
    ),
    Row("lora_pissa", pl.LoRA(rank=2, init="pissa")),
    Row("lora_olora", pl.LoRA(rank=2, init="olora", targets=anywhere), only=("conv1d_hf", "raw")),
    Row("lora_rows", pl.LoRA(rank=2, targets=FUSED), only=("gpt_fused",)),
    Row(
        "lora_attention",
        pl.LoRA(rank=2, targets=["*in_proj_weight[q]", "*in_proj_weight[v]", "out_proj"]),
        only=("mha_encoder", "mha_seq_first"),
    ),
    Row("dora", pl.DoRA(rank=3, alpha=5)),
    Row("dora_anywhere", pl.DoRA(rank=2, scaling="rslora", targets=anywhere)),
    Row(
        "dora_pissa",
        pl.DoRA(rank=2, init="pissa"),
        only=("mlp", "conv1d_hf", "conv2d_grouped", "conv_transpose"),
    ),
    Row("dora_rows", pl.DoRA(rank=2, targets=FUSED), only=("gpt_fused",)),
    Row(
        "dora_inputs",
        pl.DoRA(rank=2, targets=["0.weight[1:5]", "2.weight[:, 1:4]"]),
        only=("conv1d_hf", "mlp"),
    ),
    Row("vera", pl.VeRA(rank=5)),
    Row("vera_anywhere", pl.VeRA(rank=4, targets=anywhere)),
    Row("vera_rows", pl.VeRA(rank=5, targets=FUSED), only=("gpt_fused",)),
    Row("vblora", pl.VBLoRA(vector_length=5, num_vectors=12), fresh=False),
    Row(
        "vblora_anywhere",
        pl.VBLoRA(
            rank=2,
            vector_length=4,
            num_vectors=9,
            topk=3,
            save_only_topk_weights=True,
            targets=anywhere,
        ),
        only=("experts", "conv_transpose", "embedding", "raw", "conv1d_hf", "lstm", "gpt_tied"),
        fresh=False,
    ),
    Row(
        "vblora_rows",
        pl.VBLoRA(vector_length=4, num_vectors=8, targets=FUSED),
        only=("gpt_fused",),
        fresh=False,
    ),
    Row("fourier", pl.FourierFT(n=30, alpha=8), fresh=False),
    Row(
        "fourier_anywhere",
        pl.FourierFT(n=21, alpha=6, init="zero", targets=anywhere),
        only=("experts", "conv_transpose", "embedding", "raw", "conv1d_hf", "lstm", "gpt_tied"),
    ),
    Row(
        "fourier_rows",
        pl.FourierFT(n=20, alpha=8, targets=FUSED),
        only=("gpt_fused",),
        fresh=False,
    ),
    Row("loha", pl.LoHa(rank=3, alpha=5)),
    Row("loha_anywhere", pl.LoHa(rank=2, targets=anywhere)),
    Row("lokr", pl.LoKr(rank=1, alpha=2, decompose_both=True)),
    Row("lokr_anywhere", pl.LoKr(rank=2, factor=2, targets=anywhere)),
    Row("lokr_rows", pl.LoKr(rank=2, targets=FUSED), only=("gpt_fused",)),
    Row("oft", pl.OFT(block_size=4)),
    Row(
        "oft_anywhere",
        pl.OFT(block_size=5, neumann_terms=3, eps=0.3, targets=anywhere),
        only=("gpt_tied", "experts", "conv_transpose", "embedding", "raw", "bilinear"),
    ),
    Row("oft_rows", pl.OFT(block_size=4, targets=FUSED), only=("gpt_fused",)),
    Row("boft", pl.BOFT(m=1)),
    Row("boft_butterfly", pl.BOFT(block_size=2, m=2), only=("gpt", "gpt_fused", "hf_llama")),
    Row(
        "boft_refused",
        pl.BOFT(m=2),
        refused={"mlp": "BOFT takes tensors of 2 or more dimensions, their inputs a multiple"},
        only=("mlp",),
    ),
    Row("hra", pl.HRA(rank=4)),
    Row(
        "hra_anywhere",
        pl.HRA(rank=2, targets=anywhere),
        only=("experts", "conv_transpose", "embedding"),
    ),
    # blocks and the root too
    Row("bottleneck", pl.BottleneckAdapter(bottleneck_size=3, targets=called)),
    Row(
        "bottleneck_parallel",
        pl.BottleneckAdapter(preset="parallel", reduction_factor=4, scale=0.5, targets=layers),
        refused={
            kind: "is true for none of the 0 sites offered"
            for kind in ("conv1d", "conv2d_grouped", "conv2d_same", "conv3d", "conv_transpose")
        },
    ),
    Row(
        "bottleneck_pfeiffer",
        pl.BottleneckAdapter(preset="pfeiffer", bottleneck_size=3),
        only=("gpt", "mha_encoder", "hf_bert", "hf_vit", "hf_t5"),
    ),
    Row(
        "compacter",
        pl.Compacter(scale=0.1, targets=called),
        refused={
            kind: "is true for none of the 0 sites offered"
            for kind in ("experts", "raw", "conv1d", "conv2d_same", "conv3d", "lstm", "gru")
        },
    ),
    Row(
        "compacter_plus",
        pl.Compacter(preset="compacter++", phm_dim=2, phm_rank=2, reduction_factor=4),
        only=("gpt", "hf_bert", "hf_gpt2", "hf_llama", "hf_t5"),
    ),
    Row("loreft", pl.LoReFT(rank=2, targets=called), fresh=False),
    Row(
        "loreft_positions",
        pl.LoReFT(rank=3, positions="f2+l1", init="identity"),
        only=tuple(
            "gpt gpt_fused gpt_tied mha_encoder hf_bert hf_gpt2 hf_llama hf_t5 hf_vit".split()
        ),
    ),
    Row("prefix", pl.PrefixTuning(prefix_length=3), refused=NO_ATTENTION, fresh=False),
    Row(
        "prefix_reparametrized",
        pl.PrefixTuning(prefix_length=3, reparametrize=True, hidden_size=7),
        refused=NO_ATTENTION,
        fresh=False,
    ),
    Row(
        "prefix_mix",
        [pl.PrefixTuning(prefix_length=3), pl.LoRA(rank=2)],
        only=("gpt_fused", "hf_gpt2", "hf_llama", "mha_encoder", "mha_decoder", "mha_seq_first"),
        fresh=False,
    ),
    Row("prompt", pl.PromptTuning(prompt_length=2), refused=NO_IDS, fresh=False),
    Row("ptuning", pl.PTuning(prompt_length=2, hidden_size=5), refused=NO_IDS, fresh=False),
    Row(
        "ptuning_lstm",
        pl.PTuning(prompt_length=2, encoder="lstm"),
        only=("gpt", "hf_bert", "hf_t5"),
        fresh=False,
    ),
    Row("gated_lora", pl.Gated(pl.LoRA(rank=2))),
    Row(
        "gated_prefix",
        pl.Gated(pl.PrefixTuning(prefix_length=2)),
        only=("gpt", "mha_encoder", "hf_bert", "hf_llama", "hf_vit"),
        fresh=False,
    ),
    Row("gated_rows", pl.Gated(pl.LoRA(rank=2, targets=FUSED)), only=("gpt_fused",)),
    Row("gated_adapter", pl.Gated(pl.BottleneckAdapter(bottleneck_size=3, targets=layers))),
    Row(
        "gated_token",
        pl.Gated(pl.BottleneckAdapter(bottleneck_size=3), per="token"),
        only=("gpt", "hf_bert", "hf_gpt2", "hf_llama", "hf_t5"),
    ),
    Row("adalora", pl.AdaLoRA(init_rank=3, target_rank=2, alpha=5, total_steps=10)),
    Row(
        "adalora_anywhere",
        pl.AdaLoRA(init_rank=3, target_rank=2, total_steps=10, targets=anywhere),
        only=("experts", "conv_transpose", "embedding", "raw", "conv1d_hf", "lstm"),
    ),
    Row(
        "adalora_rows",
        pl.AdaLoRA(init_rank=3, target_rank=2, total_steps=10, targets=FUSED),
        only=("gpt_fused",),
    ),
    Row("ia3", pl.IA3()),
    Row(
        "ia3_feedforward",
        pl.IA3(feedforward=True),
        refused={"bilinear": "IA3 takes none of this model's sites by default"},
    ),
    Row("ia3_rows", pl.IA3(targets=["qkv[q]", "qkv[v]"]), only=("gpt_fused",)),
    Row(
        "norm",
        pl.NormTuning(),
        refused={
            kind: "NormTuning takes none of this model's sites by default"
            for kind in (
                "mlp mha_seq_first shared experts raw bilinear conv1d conv2d_grouped conv2d_same "
                "conv3d conv_transpose embedding embedding_bag lstm gru weight_norm conv1d_hf"
            ).split()
        },
    ),
    Row("sparse", pl.SparseMask(fraction=0.2)),
    Row("sparse_rows", pl.SparseMask(fraction=0.3, targets=FUSED), only=("gpt_fused",)),
    Row("shira", pl.SHiRA(rank=1)),
    Row("ltsft", pl.LTSFT(steps=10)),
    Row("ltsft_rows", pl.LTSFT(steps=10, targets=FUSED), only=("gpt_fused",)),
    Row("diff_pruning", pl.DiffPruning(steps=10)),
    Row(
        "diff_pruning_structured",
        pl.DiffPruning(steps=10, structured=True, targets=anywhere),
        only=("mlp", "raw", "experts", "conv1d_hf", "lstm", "gpt_tied"),
    ),
    Row("diff_pruning_rows", pl.DiffPruning(steps=10, targets=FUSED), only=("gpt_fused",)),
    Row(
        "bitfit",
        pl.BitFit(),
        refused={
            kind: "BitFit takes none of this model's sites by default"
            for kind in ("hf_llama", "hf_t5")
        },
    ),
    Row(
        "bitfit_added",
        pl.BitFit(add_missing=True),
        only=("mlp", "gpt", "conv2d_same", "bilinear", "hf_llama", "hf_t5"),
    ),
    Row("full", pl.FullTuning()),
    Row(
        "full_top",
        pl.FullTuning(top_layers=1),
        refused={"raw": "top_layers goes by the numbers of layers in a list: there are none"},
        only=("mlp", "gpt", "hf_t5", "raw"),
    ),
    Row(
        "mix",
        [pl.LoRA(targets="*attn*"), pl.BitFit(), pl.FullTuning(targets=["lm_head", "*norm"])],
        only=("gpt", "gpt_fused", "gpt_tied"),
    ),
)


def unmergeable(delta: pl.Delta) -> str:
    """What `merge` says where it has nothing to merge, or nothing to merge into."""
    if not all(placed.patch.has_value for placed in delta.placed.values()):
        return "changes calls"
    stored = all(p.site.slot in p.site.module._parameters for p in delta.placed.values())
    return "" if stored else "computed by a parametrization"


# torch itself refuses to pickle a parametrized module
UNPICKLABLE = {"weight_norm": "only supported through state_dict"}

# here torch picks its kernels by what requires a gradient, so freezing alone moves the last bits
FUSED_BY_TORCH = ("mha_encoder", "mha_decoder", "mha_seq_first", "lstm", "gru")

CELLS = [
    pytest.param(row, kind, id=f"{row.name}-{kind}")
    for row in METHODS
    for kind in KINDS
    if (not row.only or kind.name in row.only) and kind.name not in row.refused
]
REFUSALS = [
    pytest.param(row, kind, id=f"{row.name}-{kind}")
    for row in METHODS
    for kind in KINDS
    if kind.name in row.refused
]
cells = pytest.mark.parametrize("row, kind", CELLS)


def takes_long(row: Row, kind: Kind) -> bool:
    """Whether compiling a cell is left to the slow run: of what others show as well, the dear."""
    real = kind.name.startswith("hf_") and kind.name != "hf_gpt2"
    return row.name.endswith("_anywhere") or (real and row.name not in ON_REAL_MODELS)


# one method of each way to change a model is compiled on every real one in the plain run
ON_REAL_MODELS = ("lora", "bottleneck", "prefix", "prompt")
compiled_cells = pytest.mark.parametrize(
    "row, kind",
    [
        pytest.param(*cell.values, id=cell.id, marks=[pytest.mark.slow] * takes_long(*cell.values))
        for cell in CELLS
    ],
)


def attached(
    row: Row, kind: Kind, name: str = "a", dtype: torch.dtype = torch.float32, seed: int = 1
) -> tuple[nn.Module, pl.Delta]:
    """The kind's model with a delta that makes a difference."""
    model = kind.model(dtype)
    return model, add(model, row, name, seed)


def add(model: nn.Module, row: Row, name: str, seed: int = 1) -> pl.Delta:
    with seeded(seed):
        return disturb(pl.attach(model, row.method, name))


@torch.no_grad()
def disturb(delta: pl.Delta) -> pl.Delta:
    for parameter in delta.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return delta


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Graphs:
    """A compiler backend that counts the graphs it's given, and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.graphs += 1
        return graph.forward


def in_threads(*jobs: Callable[[], None]) -> None:
    """Runs the jobs at once, and raises what any of them raised."""
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        torch.set_num_threads(1)  # a thread has its own limit
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("row, kind", REFUSALS)
def test_refusal(row: Row, kind: Kind) -> None:
    model = kind.model()
    before = digest(model)
    with pytest.raises(pl.TargetError, match=row.refused[kind.name]):
        pl.attach(model, row.method)
    assert_same(before, digest(model))


@cells
def test_law_1_a_fresh_delta_changes_no_output(row: Row, kind: Kind) -> None:
    model, batch = kind.model(), kind.batch()
    before = kind.run(model, batch)
    pl.attach(model, row.method)
    if row.fresh:
        close(kind.run(model, batch), before, 1e-6 if kind.name in FUSED_BY_TORCH else 0.0)
    else:
        assert not torch.allclose(kind.run(model, batch), before)


@cells
def test_law_2_only_the_delta_learns(row: Row, kind: Kind) -> None:
    model, batch = kind.model(), kind.batch()
    base = {name: bits(p) for name, p in model.named_parameters()}
    delta = add(model, row, "a")
    first = {name: bits(p) for name, p in delta.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in delta.parameters()}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):
        kind.run(model.train(), batch).square().mean().backward()
        optimizer.step()
    now = dict(model.named_parameters())
    assert all(now[name].grad is None and bits(now[name]) == was for name, was in base.items())
    stuck = [name for name, p in delta.named_parameters() if bits(p) == first[name]]
    assert not stuck, stuck


@cells
def test_law_3_detach_is_exact_in_either_order(row: Row, kind: Kind) -> None:
    for order in ("ab", "ba"):
        model, batch = kind.model(), kind.batch()
        next(model.parameters()).requires_grad_(False)
        kind.run(model, batch)
        before, output = digest(model), kind.run(model, batch)
        for seed, name in enumerate("ab"):
            add(model, row, name, seed)
        kind.run(model, batch)
        for name in order:
            pl.detach(model, name)
        assert_same(before, digest(model))
        assert torch.equal(kind.run(model, batch), output)


@cells
def test_law_4_merged_equals_attached(row: Row, kind: Kind) -> None:
    model, delta = attached(row, kind, dtype=torch.float64)
    batch = kind.batch(dtype=torch.float64)
    output = kind.run(model, batch)
    pl.use(model, None)
    assert not torch.allclose(kind.run(model, batch), output)
    pl.use(model, "a")
    if why := unmergeable(delta):
        before = digest(model)
        with pytest.raises(pl.PeftliteError, match=why):
            pl.merge(model, "a")
        assert_same(before, digest(model))
        return
    pl.merge(model, "a")
    close(kind.run(model, batch), output, 1e-6)
    with torch.no_grad():  # torch's fused paths read the weights themselves
        close(kind.run(model, batch), output, 1e-6)
        pl.unmerge(model, "a")
        close(kind.run(model, batch), output, 1e-6)


@cells
def test_law_5_unmerge_restores_every_bit(row: Row, kind: Kind) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, delta = attached(row, kind, dtype=dtype)
        if unmergeable(delta):
            return  # law 4 asserts the refusal
        add(model, row, "b", seed=2)
        pl.use(model, "a")
        before = digest(model)
        for cycle in ("aa", "abab", "abba"):
            for name in cycle:
                merged = pl.deltas(model)[name].merged
                (pl.unmerge if merged else pl.merge)(model, name)
            assert_same(before, digest(model))


@cells
def test_law_6_a_file_gives_the_same_bits(row: Row, kind: Kind, tmp_path) -> None:
    model, delta = attached(row, kind)
    batch = kind.batch()
    output = kind.run(model, batch)
    pl.save(delta, tmp_path / "a.safetensors")
    fresh = kind.model()
    loaded = pl.load(fresh, tmp_path / "a.safetensors")
    assert not any(p.requires_grad for p in fresh.parameters())
    loaded.requires_grad_()  # the same kernels as before
    assert torch.equal(kind.run(fresh, batch), output)
    pl.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (
        tmp_path / "again.safetensors"
    ).read_bytes()


@cells
def test_law_7_the_base_keeps_its_keys_and_checkpoints(row: Row, kind: Kind) -> None:
    checkpoint = kind.model().state_dict()
    model, _ = attached(row, kind)
    assert set(checkpoint) <= set(model.state_dict())
    batch = kind.batch()
    output = kind.run(model, batch)
    model.load_state_dict(checkpoint)
    assert torch.equal(kind.run(model, batch), output)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    other, _ = attached(row, kind)
    model.load_state_dict(other.state_dict())
    assert torch.equal(kind.run(model, batch), output)


@cells
def test_law_8_copies_and_pickles(row: Row, kind: Kind) -> None:
    model, _ = attached(row, kind)
    batch = kind.batch()
    output = kind.run(model, batch)
    twins = [copy.deepcopy(model)]
    if kind.name in UNPICKLABLE:
        with pytest.raises(RuntimeError, match=UNPICKLABLE[kind.name]):
            pickle.dumps(model)
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        twins += [pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)]
    for twin in twins:
        assert torch.equal(kind.run(twin, batch), output)
        disturb(pl.deltas(twin)["a"])
        assert torch.equal(kind.run(model, batch), output)
        pl.detach(twin, "a")
        assert len(list(twin.modules())) == len(list(kind.model().modules()))
        assert not any(isinstance(m, host.Host) for m in twin.modules())


@compiled_cells
def test_law_9_compiles_and_exports(row: Row, kind: Kind) -> None:
    model, delta = attached(row, kind)
    batch = kind.batch()
    torch._dynamo.reset()
    counter = Graphs()
    if kind.uncompilable is None:
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for _ in range(2):  # swapping values adds no graph
            close(kind.run(compiled, batch), kind.run(model, batch))
            disturb(delta)
        assert counter.graphs == 1
        pl.use(model, None)
        close(kind.run(compiled, batch), kind.run(model, batch))
        pl.use(model, "a")
        close(kind.run(compiled, batch), kind.run(model, batch))
        assert counter.graphs == 2
    if kind.unexportable is None:
        exported = torch.export.export(model, (), batch)
        close(kind.run(exported.module(), batch), kind.run(model, batch))


@cells
def test_law_10_rows_equal_each_row_alone(row: Row, kind: Kind) -> None:
    model, _ = attached(row, kind)
    add(model, row, "b", seed=2)
    rows, batch = ["a", None, "b", "a", ["a", "b"]], kind.batch(5)
    if not kind.batched:
        with pytest.raises(pl.PeftliteError, match="has 5 rows in its first"):
            with pl.using(model, rows=rows):
                kind.run(model, {k: v[:, :4] for k, v in batch.items()})
        return
    with pl.using(model, rows=rows):
        mixed = kind.run(model, batch)
    for i, names in enumerate(rows):
        with pl.using(model, names):
            close(kind.run(model, {k: v[i : i + 1] for k, v in batch.items()}), mixed[i : i + 1])


@cells
def test_law_11_threads_never_see_one_another(row: Row, kind: Kind) -> None:
    model, _ = attached(row, kind)
    add(model, row, "b", seed=2)
    batch = kind.batch()
    expected = {}
    for names in ("a", "b", None):
        with pl.using(model, names):
            expected[names] = kind.run(model, batch)

    def work(names: str | None) -> Callable[[], None]:
        def loop() -> None:
            for _ in range(5):
                with pl.using(model, names):
                    assert torch.equal(kind.run(model, batch), expected[names])

        return loop

    in_threads(*map(work, expected))
    assert torch.equal(kind.run(model, batch), expected["b"])


@cells
def test_law_12_a_failure_leaves_the_model_as_it_was(row: Row, kind: Kind) -> None:
    model = kind.model()
    before = digest(model)
    plant, failures = host.plant, 0
    while True:
        countdown = iter(range(failures, -1, -1))

        def failing(*args, countdown=countdown, **kwargs):
            if next(countdown) == 0:
                raise MemoryError
            plant(*args, **kwargs)

        try:
            with mock.patch.object(host, "plant", failing):
                pl.attach(model, row.method)
            break
        except MemoryError:
            assert_same(before, digest(model))
            failures += 1
        except StopIteration:
            break
    assert failures
    pl.detach(model, "default")
    assert_same(before, digest(model))


@cells
def test_law_13_checkpointing_gives_the_same_gradients(row: Row, kind: Kind) -> None:
    model, delta = attached(row, kind)
    model.train()
    batch = kind.batch(5)
    with seeded():  # some methods draw in training, as dropout does
        kind.run(model, batch).square().mean().backward()
    plain = [p.grad.clone() for p in delta.parameters()]
    model.zero_grad()
    with seeded():
        output = checkpoint(lambda: kind.run(model, batch), use_reentrant=False)
        output.square().mean().backward()
    for parameter, grad in zip(delta.parameters(), plain, strict=True):
        close(parameter.grad, grad)
