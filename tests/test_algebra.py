"""Algebra: every way to combine deltas against the explicit sum in fp64, and extract against merge.

The oracle reads every tensor of a copy of the model in fp64, under each delta and under none: it
knows nothing of methods, factors or forms.
"""

import copy
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftlite as pl
from peftlite.core.site import sites
from tests.digest import assert_same, digest
from tests.zoo import KINDS, Kind

ZOO = {kind.name: kind for kind in KINDS}
Tensors = dict[str, Tensor]
Case = tuple[Kind, nn.Module, dict[str, float]]

# ΔW of these doesn't depend on W, so that what they do together is the sum
ADDED = (
    pl.LoRA(rank=2, alpha=3),
    pl.LoRA(rank=3, init="pissa"),
    [pl.LoRA(rank=1, scaling="rslora"), pl.BitFit()],
    pl.LoHa(rank=2),
    pl.VeRA(rank=3),
    pl.BitFit(),
    pl.FullTuning(),
    pl.SparseMask(fraction=0.1),
)
TURNED = (pl.OFT(block_size=2), pl.DoRA(rank=2), [pl.DoRA(rank=1), pl.BitFit()])


@torch.no_grad()
def disturb(delta: pl.Delta) -> pl.Delta:
    for parameter in delta.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return delta


def read(model: nn.Module) -> Tensors:
    """Every tensor, as the model itself would read it."""
    slots = {s.address: getattr(s.module, s.slot) for s in sites(model) if not s.is_call}
    return {address: w.detach().clone() for address, w in slots.items()}


def changes(model: nn.Module, *names: str) -> list[Tensors]:
    """W' − W of deltas in fp64, for every tensor."""
    twin, found = copy.deepcopy(model).double().eval(), []
    for name in (None, *names):
        pl.use(twin, name)
        found.append(read(twin))
    before, *after = found
    return [{address: w - before[address] for address, w in its.items()} for its in after]


def change(model: nn.Module, name: str) -> Tensors:
    return changes(model, name)[0]


def close(got: Tensors, expected: Tensors) -> None:
    size = 1e-3 + max(float(w.abs().max()) for w in expected.values())
    for address, value in expected.items():
        torch.testing.assert_close(got[address], value, rtol=1e-5, atol=2e-6 * size)


@st.composite
def cases(draw: st.DrawFn, methods: tuple = (*ADDED, *TURNED)) -> Case:
    """A model with two or three deltas that do something, and a weight for each."""
    kinds = ("mlp", "conv2d_grouped", "conv1d_hf", "gpt", "gpt_tied")
    kind, names = ZOO[draw(st.sampled_from(kinds))], "abc"[: draw(st.integers(2, 3))]
    model = kind.model()
    torch.manual_seed(draw(st.integers(0, 999)))
    for name in names:
        disturb(pl.attach(model, draw(st.sampled_from(methods)), name))
    weights = st.floats(0.25, 2) | st.floats(-2, -0.25)
    return kind, model, {name: draw(weights) for name in names}


def plus(each: list[Tensors], weights: list[float]) -> Tensors:
    return {a: sum(w * c[a] for w, c in zip(weights, each, strict=True)) for a in each[0]}


# -- every way to combine


@settings(max_examples=25)
@given(case=cases())
def test_sum_and_linear(case: Case) -> None:
    _, model, weights = case
    each = changes(model, *weights)
    pl.combine(model, weights, name="sum")
    close(change(model, "sum"), plus(each, [*weights.values()]))
    total = sum(weights.values())
    if abs(total) > 0.1:
        pl.combine(model, weights, "linear", "mean")
        close(change(model, "mean"), plus(each, [w / total for w in weights.values()]))


@pytest.mark.heavy
@settings(max_examples=25)
@given(case=cases(), rank=st.integers(1, 6), energy=st.floats(0.05, 1))
def test_svd_keeps_the_energy_that_it_says_by_the_least_rank(case, rank, energy) -> None:
    _, model, weights = case
    explicit = plus(changes(model, *weights), [*weights.values()])
    for options in ({"rank": rank}, {"energy": energy}):
        delta = pl.combine(model, weights, "svd", next(iter(options)), **options)
        got = change(model, delta.name)
        for address, placed in delta.placed.items():
            value = explicit[address]
            if value.dim() < 2:
                close({address: got[address]}, {address: value})
                continue
            power = torch.linalg.svdvals(value.flatten(1)).square()
            r, total = placed.method.rank, power.sum()
            assert delta.energy[address] == pytest.approx(float(power[:r].sum() / total), abs=1e-6)
            lost = (got[address] - value).square().sum() / total
            assert float(lost) == pytest.approx(1 - delta.energy[address], abs=1e-6)
            if options == {"rank": rank}:
                assert r == rank or (r < rank and lost < 1e-6)
            else:
                assert power[:r].sum() >= (energy - 1e-6) * total
                assert power[: r - 1].sum() < (energy + 1e-6) * total


def trimmed(delta: pl.Delta, its: Tensors, density: float) -> Tensors:
    """A change without all but a delta's largest entries."""
    entries = sum(placed.site.tensor.numel() for placed in delta.placed.values())
    largest = torch.cat([w.flatten() for w in its.values()]).abs().sort(descending=True)
    least = largest.values[max(1, round(density * entries)) - 1]
    return {address: w.where(w.abs() >= least, 0) for address, w in its.items()}


@pytest.mark.heavy
@settings(max_examples=25)
@given(case=cases(), density=st.floats(0.05, 1))
def test_ties_and_magnitude_prune(case: Case, density: float) -> None:
    _, model, weights = case
    deltas = pl.deltas(model)
    each = changes(model, *weights)
    parts = [trimmed(deltas[n], its, density) for n, its in zip(weights, each, strict=True)]
    pl.combine(model, weights, "magnitude_prune", "pruned", density=density)
    close(change(model, "pruned"), plus(parts, [*weights.values()]))
    explicit = {}
    for address in parts[0]:
        values = [w * p[address] for w, p in zip(weights.values(), parts, strict=True)]
        agree = [v.sign() == sum(values).sign() for v in values]
        count = sum(yes.double() * (v != 0) for yes, v in zip(agree, values, strict=True))
        kept = sum(v * yes for yes, v in zip(agree, values, strict=True))
        explicit[address] = kept / count.clamp(min=1)
    pl.combine(model, weights, "ties", "ties", density=density)
    close(change(model, "ties"), explicit)


@settings(max_examples=20)
@given(case=cases(), density=st.floats(0.2, 1), seed=st.integers(0, 99))
def test_dare_adds_up_some_entries_and_no_others(case: Case, density: float, seed: int) -> None:
    _, model, weights = case
    each = changes(model, *weights)
    delta = pl.combine(model, weights, "dare", "dare", density=density, seed=seed)
    for address, value in change(model, "dare").items():
        sums = [torch.zeros_like(value)]
        for weight, its in zip(weights.values(), each, strict=True):
            sums += [total + weight * its[address] / density for total in sums]
        error = torch.stack([(value - total).abs() for total in sums]).amin(0)
        assert (error <= 1e-5).all()
    again = pl.combine(model, weights, "dare", "again", density=density, seed=seed)
    assert_equal(delta, again)


def assert_equal(ours: pl.Delta, theirs: pl.Delta) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_dare_keeps_the_expected_value() -> None:
    model = nn.Sequential(nn.Linear(200, 100, bias=False))
    delta = pl.attach(model, pl.FullTuning(), "ones")
    torch.nn.init.ones_(next(delta.parameters()))
    new = pl.combine(model, {"ones": 1}, "dare", density=0.25)
    values = new.placed["0.weight"].patch.values
    assert torch.equal(values, torch.full_like(values, 4))
    assert abs(len(values) / 20_000 - 0.25) < 6 * (0.25 * 0.75 / 20_000) ** 0.5


def holding(*rows: list[int]) -> nn.Module:
    """A model with a delta for each row, a, b, …, that adds just that."""
    model = nn.Sequential(nn.Linear(len(rows[0]), 1, bias=False))
    for name, row in zip("abcd", rows, strict=False):
        delta = pl.attach(model, pl.FullTuning(), name)
        delta.load_state_dict({"0.weight:difference": torch.tensor([row]).float()})
    return model


@pytest.mark.parametrize(
    ("how", "rows", "options", "expected"),
    [
        # ones of each sign, then of one sign alone; two that cancel elect no sign
        ("ties", [[3, -1, 2, 5], [1, 2, 4, -5]], {"density": 1}, [2, 2, 3, 0]),
        ("ties", [[3, -1, 2, 5], [1, 2, 4, -5]], {"density": 0.5}, [3, 0, 4, 0]),
        # what was trimmed doesn't count in the mean
        ("ties", [[6, 1], [4, 9], [1, 3]], {"density": 0.5}, [6, 6]),
        ("magnitude_prune", [[3, -1, 2, 5], [1, 2, 4, -6]], {"density": 0.5}, [3, 0, 4, -1]),
        ("linear", [[4, 0], [0, 8]], {}, [2, 4]),
        ("dare", [[4, 1], [3, 8]], {"density": 1}, [7, 9]),
    ],
)
def test_by_hand(how: str, rows: list[list[int]], options: dict, expected: list[int]) -> None:
    model = holding(*rows)
    pl.combine(model, dict.fromkeys(pl.deltas(model), 1), how, **options)
    assert change(model, "combined")["0.weight"].tolist() == [expected]


# -- what holds the result


@settings(max_examples=20)
@given(case=cases(methods=ADDED))
def test_a_sum_does_what_its_terms_do_together(case: Case) -> None:
    kind, model, weights = case
    pl.use(model, [*weights])
    together = kind.run(model, kind.batch())
    delta = pl.combine(model, dict.fromkeys(weights, 1), name="sum")
    assert not any(p.requires_grad for p in delta.parameters())
    torch.testing.assert_close(kind.run(model, kind.batch()), together, rtol=1e-4, atol=1e-4)


def pair(kind: str, *methods: pl.Method, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = ZOO[kind].model(dtype)
    for name, method in zip("ab", methods, strict=True):
        disturb(pl.attach(model, method, name))
    return model


@pytest.mark.parametrize("kind", ["mlp", "conv2d_grouped", "conv1d_hf", "experts", "embedding"])
def test_cat_is_exact_and_puts_factors_side_by_side(kind: str) -> None:
    model = pair(kind, pl.LoRA(rank=2, alpha=4), pl.LoRA(rank=3))
    delta = pl.combine(model, {"a": 1, "b": -1}, "cat", "cat")
    assert delta.methods == (pl.LoRA(rank=5),)
    ours, a, b = (pl.deltas(model)[name].state_dict() for name in ("cat", "a", "b"))
    for address in delta.placed:
        its = f"{address}:a", f"{address}:b"
        assert torch.equal(ours[its[0]], torch.cat([a[its[0]], b[its[0]]], -2))
        assert torch.equal(ours[its[1]], torch.cat([2 * a[its[1]], -b[its[1]]], -1))


def test_the_form_that_takes_the_least() -> None:
    model = pair("mlp", pl.LoRA(rank=2), pl.LoRA(rank=8))
    assert pl.combine(model, {"a": 1}, name="low").methods == (pl.LoRA(rank=2),)
    assert {type(m) for m in pl.combine(model, {"a": 1, "b": 1}, name="high").methods} == {
        pl.FullTuning
    }
    disturb(pl.attach(model, pl.LTSFT(steps=1, fraction=0.1), "few"))
    placed = pl.deltas(model)["few"].placed
    for item in placed.values():  # most entries pruned, as by training
        item.patch.pruned = torch.rand(item.site.shape) > 0.1
    sparse = pl.combine(model, 2 * pl.deltas(model)["few"], name="sparse")
    assert {type(m) for m in sparse.methods} == {pl.SparseMask}
    assert sparse.num_bytes < 0.3 * sum(item.site.tensor.nbytes for item in placed.values())
    close(change(model, "sparse"), plus(changes(model, "few"), [2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["sum", "svd", "ties"])
def test_a_file_holds_it(how: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = pair("gpt", pl.LoHa(rank=2), pl.SparseMask(fraction=0.1), dtype=dtype)
    options = {"svd": {"energy": 0.9}, "ties": {"density": 0.2}}.get(how, {})
    delta = pl.combine(model, {"a": 1, "b": 0.5}, how, "new", **options)
    assert all(p.dtype is torch.float32 for p in delta.parameters())
    y = ZOO["gpt"].run(model, ZOO["gpt"].batch())
    pl.save(delta, tmp_path / "new")
    pl.detach(model, "new")
    assert_equal(pl.load(model, tmp_path / "new"), delta)
    assert torch.equal(ZOO["gpt"].run(model, ZOO["gpt"].batch()), y)


def test_nothing_is_held_and_saved_too(tmp_path: Path) -> None:
    model = ZOO["mlp"].model()
    pl.attach(model, pl.LoHa(rank=2), "nothing")
    delta = pl.combine(model, {"nothing": 1}, name="still")
    assert delta.num_parameters == 0
    pl.save(delta, tmp_path / "still")
    x = ZOO["mlp"].batch()["input"]
    y = model(x)
    pl.load(model, tmp_path / "still", name="loaded")
    assert torch.equal(model(x), y)
    svd = pl.combine(model, {"nothing": 1}, "svd", energy=0.5)
    assert set(svd.energy.values()) == {1.0} and svd.methods == (pl.LoRA(rank=1),)


def test_parts_of_a_tensor_stay_parts() -> None:
    q, v, rows = ("*.qkv.weight[q]", "*.qkv.weight[v]", "*.qkv.weight[6:18]")
    model = pair("gpt_fused", pl.LoRA(rank=1, targets=[q, v]), pl.LoRA(rank=2, targets=q))
    delta = pl.combine(model, {"a": 2, "b": 1}, name="parts")
    ranks = {address: placed.method.rank for address, placed in delta.placed.items()}
    assert ranks["blocks.0.attn.qkv.weight[0:12]"] == 3
    assert ranks["blocks.0.attn.qkv.weight[24:36]"] == 1
    close(change(model, "parts"), plus(changes(model, *"ab"), [2, 1]))
    disturb(pl.attach(model, pl.OFT(block_size=4, targets=rows), "c"))
    delta = pl.combine(model, {"a": 2, "c": 1}, name="whole")
    assert list(delta.placed) == ["blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"]
    close(change(model, "whole"), plus(changes(model, *"ac"), [2, 1]))


def test_a_tied_tensor_is_one_tensor_whatever_it_is_called(tmp_path: Path) -> None:
    other = ZOO["gpt_tied"].model()
    disturb(pl.attach(other, pl.FullTuning(targets="lm_head"), "head"))
    pl.save(pl.deltas(other)["head"], tmp_path / "head")
    model = ZOO["gpt_tied"].model()
    before = digest(model)
    disturb(pl.attach(model, pl.FullTuning(targets="embed"), "embed"))
    pl.load(model, tmp_path / "head", check_base="off")
    delta = pl.combine(model, {"embed": 1, "head": 2}, name="both")
    assert list(delta.placed) == ["embed.weight"]
    close(change(model, "both"), plus(changes(model, "embed", "head"), [1, 2]))
    for name in ("embed", "head"):
        pl.merge(model, name)
    for name in ("embed", "head", "both"):
        pl.detach(model, name)
    assert_same(before, digest(model))


@pytest.mark.parametrize("backup", ["device", "residual"])
def test_merged_deltas_are_combined_as_if_they_were_not(backup: str) -> None:
    model = pair("mlp", pl.OFT(block_size=2), pl.DoRA(rank=2))
    for name in "ab":
        pl.combine(model, {"a": 1, "b": 1}, name=f"before_{name}")
        pl.merge(model, name, backup=backup)
    after = pl.combine(model, {"a": 1, "b": 1}, name="after")
    assert_equal(after, pl.deltas(model)["before_a"])
    assert_equal(after, pl.deltas(model)["before_b"])


# -- expressions


def test_expressions() -> None:
    model = pair("mlp", pl.LoRA(rank=1), pl.BitFit())
    a, b = pl.deltas(model).values()
    for expression, weights in (
        (a + b, {"a": 1, "b": 1}),
        (0.5 * (a - b) * 3, {"a": 1.5, "b": -1.5}),
        (-a, {"a": -1}),
        (a + 2 * a - b, {"a": 3, "b": -1}),
        (a, {"a": 1}),
    ):
        ours = pl.combine(model, expression, name="ours")
        assert_equal(ours, pl.combine(model, weights, name="theirs"))
        pl.detach(model, "ours")
        pl.detach(model, "theirs")
    assert repr(0.7 * a - b) == "0.7 * a + -1 * b"
    for wrong in (lambda: a * b, lambda: a + 1, lambda: "x" * a, lambda: a - None):
        with pytest.raises(TypeError):
            wrong()


def test_rescale_and_resize_rank() -> None:
    model = pair("conv1d_hf", pl.LoRA(rank=4), pl.BitFit())
    pl.rescale(model, "a", -0.5, name="half")
    close(change(model, "half"), plus(changes(model, "a"), [-0.5]))
    small = pl.resize_rank(model, "a", rank=2, name="small")
    assert small.methods == (pl.LoRA(rank=2),)
    assert all(0 < kept < 1 for kept in small.energy.values())
    whole = pl.resize_rank(model, "a", energy=1 - 1e-9, name="whole")
    assert whole.methods == (pl.LoRA(rank=4),)
    close(change(model, "whole"), change(model, "a"))


# -- extract


def tuned(kind: str, *methods: pl.Method | list[pl.Method]) -> nn.Module:
    """A model with changes in its weights."""
    model = ZOO[kind].model()
    for i, method in enumerate(methods):
        disturb(pl.attach(model, method, str(i)))
        pl.merge(model, str(i), backup="none")
    return model


@pytest.mark.parametrize("form", ["model", "state dict"])
@pytest.mark.parametrize("kind", ["mlp", "conv2d_grouped", "conv1d_hf", "gpt_tied", "hf_bert"])
def test_extract_takes_back_what_was_merged(kind: str, form: str) -> None:
    base, batch = ZOO[kind].model(), ZOO[kind].batch()
    after = tuned(kind, pl.OFT(block_size=2), pl.BitFit())
    before = digest(base)
    given = after if form == "model" else after.state_dict()
    delta = pl.extract(base, given, [pl.LoRA(rank=64), pl.FullTuning()])
    expected = ZOO[kind].run(after, batch)
    torch.testing.assert_close(ZOO[kind].run(base, batch), expected, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in delta.parameters())
    assert all(kept == pytest.approx(1) for kept in delta.energy.values())
    pl.use(base, None)
    now, then = read(base), read(after)
    assert {a for a in now if not torch.equal(now[a], then[a])} == {*delta.placed}
    pl.detach(base, "extracted")
    assert_same(before, digest(base))


def test_extract_reads_what_a_parametrization_makes() -> None:
    base, after = ZOO["weight_norm"].model(), ZOO["weight_norm"].model()
    torch.nn.utils.parametrize.remove_parametrizations(after[2], "weight")
    torch.nn.init.normal_(after[2].weight)
    delta = pl.extract(base, after, pl.DoRA(rank=64, init="pissa"))
    assert list(delta.placed) == ["2.weight"]
    x = ZOO["weight_norm"].batch()["input"]
    torch.testing.assert_close(base(x), after(x), rtol=1e-4, atol=1e-4)


def test_extract_keeps_the_energy_by_the_least_rank_of_each_site() -> None:
    base, after = ZOO["mlp"].model(), tuned("mlp", pl.LoRA(rank=2), pl.OFT(block_size=2))
    delta = pl.extract(base, after, pl.LoRA(alpha=3), energy=0.9)
    for address, placed in delta.placed.items():
        d = (read(after)[address] - placed.site.whole).detach().double()
        power = torch.linalg.svdvals(d).square()
        shares = power.cumsum(0) / power.sum()
        assert placed.method.rank == int((shares < 0.9).sum()) + 1
        assert delta.energy[address] == pytest.approx(float(shares[placed.method.rank - 1]))
    assert len({placed.method.rank for placed in delta.placed.values()}) > 1


def test_extract_takes_the_largest_entries() -> None:
    base, after = ZOO["mlp"].model(), tuned("mlp", pl.FullTuning(targets="*weight"))
    method = pl.SparseMask(fraction=0.1, targets="*weight")
    delta = pl.extract(base, after, method)
    pl.use(base, None)
    explicit = {a: w.double() - read(base)[a] for a, w in read(after).items() if "weight" in a}
    explicit = trimmed(delta, explicit, 0.1)
    close(change(base, "extracted"), explicit)
    assert delta.num_parameters == round(0.1 * sum(d.numel() for d in explicit.values()))


def test_each_method_takes_what_those_before_it_leave() -> None:
    base = ZOO["gpt_fused"].model()
    after = tuned(
        "gpt_fused", pl.FullTuning(targets=["*.qkv.weight[v]", "*norm*", "*.o_proj.bias"])
    )
    methods = [pl.LoRA(rank=16, targets="*.qkv.weight[v]"), pl.NormTuning(), pl.BitFit()]
    delta = pl.extract(base, after, methods)
    kinds = {type(p.method).__name__: p.site.address for p in delta.placed.values()}
    assert kinds == {
        "LoRA": "blocks.1.attn.qkv.weight[24:36]",
        "NormTuning": "norm.bias",
        "BitFit": "blocks.1.attn.o_proj.bias",
    }
    some = pl.extract(base, after, pl.BitFit(), "some", rest="ignore")
    assert {placed.site.slot for placed in some.placed.values()} == {"bias"}


def test_buffers_count() -> None:
    base, after = ZOO["norms"].model(), tuned("norms", pl.BitFit())
    pl.extract(base, after, pl.BitFit(), "same")
    after[4].running_mean += 1
    with pytest.raises(pl.PeftliteError, match=r"4\.running_mean"):
        pl.extract(base, after, pl.BitFit())
    pl.extract(base, after, pl.BitFit(), rest="ignore")


# -- against peft. Its "svd" and "cat" work on ΔW as ours do. Its "linear", "ties", "dare_linear"
# and "magnitude_prune" work on the factors, which is another thing; with "_svd" and at full rank
# they work on ΔW, and as ours do where there is one tensor, since peft trims tensor by tensor, and
# in "ties" where the weights are equal, since peft elects the signs before it weighs.


@pytest.mark.parametrize(
    ("ours", "theirs", "weights", "targets"),
    [
        ({"how": "cat"}, {"combination_type": "cat"}, [0.7, -0.4], ["0", "2"]),
        ({"how": "svd", "rank": 3}, {"combination_type": "svd", "svd_rank": 3}, [0.7, -0.4], ["0"]),
        ({"how": "svd", "rank": 3}, {"combination_type": "svd", "svd_rank": 3}, [2, 1], ["0", "2"]),
        *(
            (
                {"how": how, "density": 0.25},
                {"combination_type": f"{how}_svd", "svd_rank": 10, "density": 0.25},
                weights,
                ["0"],
            )
            for how, weights in (("ties", [0.6, 0.6]), ("magnitude_prune", [0.7, -0.4]))
        ),
    ],
)
def test_as_peft_has_it(ours: dict, theirs: dict, weights: list[float], targets: list[str]) -> None:
    model = ZOO["mlp"].model()
    peers = None
    for name, alpha in (("sql", 4), ("chat", 3)):
        method = pl.LoRA(rank=2, alpha=alpha, targets=[f"{path}.weight" for path in targets])
        state = disturb(pl.attach(model, method, name)).state_dict()
        config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=targets)
        if peers is None:
            peers = peft.get_peft_model(ZOO["mlp"].model(), config, name)
        else:
            peers.add_adapter(name, config)
        for path in targets:
            layer = peers.get_submodule(f"base_model.model.{path}")
            layer.lora_A[name].weight.data.copy_(state[f"{path}.weight:a"])
            layer.lora_B[name].weight.data.copy_(state[f"{path}.weight:b"])
    peers.add_weighted_adapter(["sql", "chat"], weights, "new", **theirs)
    pl.combine(model, dict(zip(("sql", "chat"), weights, strict=True)), **ours)
    got = change(model, "combined")
    for path in targets:
        layer = peers.get_submodule(f"base_model.model.{path}")
        expected = layer.get_delta_weight("new").detach().double()
        torch.testing.assert_close(got[f"{path}.weight"], expected, rtol=1e-5, atol=1e-6)
