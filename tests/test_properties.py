"""Properties: LoRA, BitFit and FullTuning on drawn layers, and the verbs in any order, in fp64."""

import copy
import itertools
import pickle
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.func import functional_call

import peftlite as pl
from peftlite.core.site import whole_address
from peftlite.core.tensors import raw
from tests import test_maps as maps
from tests.digest import bits
from tests.test_maps import booleans, close, layouts, seeds

pytestmark = maps.pytestmark

# -- strategies

dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
scales = {
    "alpha": st.none() | st.floats(0.25, 4),
    "scaling": st.sampled_from(["alpha/r", "rslora"]),
}
loras = st.builds(pl.LoRA, rank=st.integers(1, 4), dtype=st.none() | dtypes, **scales)
any_call = st.one_of(
    maps.linears(),
    maps.hf_conv1ds(),
    maps.embeddings(),
    maps.convs(),
    maps.transposed_convs(),
)

Layer = tuple[nn.Linear, Tensor]


@st.composite
def layers(draw: st.DrawFn, dtypes: st.SearchStrategy = dtypes) -> Layer:
    """A Linear and an input, of any dtype, layout and batch shape."""
    torch.manual_seed(draw(seeds))
    i, o, dtype = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(dtypes)
    layer = nn.Linear(i, o, bias=draw(booleans), dtype=dtype)
    layer.weight = nn.Parameter(draw(layouts)(o, i, dtype=dtype))
    batch = draw(st.lists(st.integers(0, 3), max_size=3))
    return layer, draw(layouts)(*batch, i, dtype=dtype)


@st.composite
def methods(draw: st.DrawFn, layer: nn.Linear) -> pl.Method | list[pl.Method]:
    lora, dtype = draw(loras), draw(st.none() | dtypes)
    options = [lora, pl.FullTuning(dtype=dtype)]
    if layer.bias is not None:
        options += [pl.BitFit(dtype=dtype), [lora, pl.BitFit(dtype=dtype)]]
    return draw(st.sampled_from(options))


# -- the oracle


def itself(t: Tensor) -> Tensor:
    return t


@torch.no_grad()
def disturb(delta: pl.Delta) -> pl.Delta:
    for parameter in delta.parameters():
        parameter.normal_()
    return delta


def factor(method: pl.LoRA) -> float:
    """s: α/r, or α/√r."""
    alpha = method.rank if method.alpha is None else method.alpha
    return alpha / (method.rank if method.scaling == "alpha/r" else method.rank**0.5)


def change(patch: pl.Patch, of: Callable[[Tensor], Tensor] = itself) -> Tensor:
    """What a patch adds to its tensor, in fp64 and the layout of a Linear: D, or s·(BA − B₀A₀)."""
    t = {name: tensor.double() for name, tensor in patch.state_dict().items()}
    if "indices" in t:
        flat = torch.zeros(patch.shape, dtype=torch.float64).flatten()
        return of(flat.index_put((t["indices"].long(),), t["values"]).view(patch.shape))
    if "difference" in t:
        return of(t["difference"])
    s, a, b = factor(patch.method), t["a"], t["b"]
    if "a0" not in t:
        return s * (of(b) @ of(a))
    return s * (of(b - t["b0"]) @ of(a) + of(t["b0"]) @ of(a - t["a0"]))


def tensors(
    layer: nn.Linear, deltas: Iterable[pl.Delta], of: Callable[[Tensor], Tensor] = itself
) -> dict[str, Tensor]:
    """The weight and bias of a Linear as the deltas change them, in fp64."""
    stored = {name: p for name, p in layer._parameters.items() if p is not None}
    found = {name: of(p.detach().double()) for name, p in stored.items()}
    for delta in deltas:
        for address, placed in delta.placed.items():
            found[address] = found[address] + change(placed.patch, of)
    return found


def exact(layer: nn.Linear, deltas: Sequence[pl.Delta], x: Tensor) -> tuple[Tensor, Tensor]:
    """The output in fp64, and the size of what was added up to make it."""
    return (
        F.linear(x.double(), **tensors(layer, deltas)),
        F.linear(x.double().abs(), **tensors(layer, deltas, torch.abs)),
    )


def within(y: Tensor, target: Sequence[Tensor], *roundings: torch.dtype) -> None:
    """That y is the target but for a few roundings, its own or others, of what was added up."""
    value, added = target
    limits = max(map(torch.finfo, (y.dtype, *roundings)), key=lambda limits: limits.eps)
    assert y.shape == value.shape
    assert ((y.double() - value).abs() <= 8 * limits.eps * added + limits.tiny).all()


# -- one delta, several deltas


@given(data=st.data(), case=layers())
def test_the_output_is_the_explicit_one_in_every_form(data, case: Layer) -> None:
    layer, x = case
    delta = disturb(pl.attach(layer, data.draw(methods(layer))))
    target = exact(layer, [delta], x)
    within(layer(x), target)  # call
    within(F.linear(x, layer.weight, layer.bias), target)  # value
    pl.merge(layer, "default")
    within(layer(x), target)


@given(data=st.data(), case=layers(), autocast=booleans)
def test_a_merge_rounds_once_and_an_unmerge_restores_the_bits(data, case, autocast) -> None:
    layer, _ = case
    delta = disturb(pl.attach(layer, data.draw(methods(layer))))
    before = {name: bits(raw(layer, name)) for name in tensors(layer, [])}
    value, added = tensors(layer, [delta]), tensors(layer, [delta], torch.abs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        pl.merge(layer, "default")
    for name in before:
        merged = raw(layer, name)
        limits, wide = torch.finfo(merged.dtype), torch.promote_types(merged.dtype, torch.float32)
        half_ulp = limits.eps / 2 * value[name].abs() + limits.tiny
        computed = 8 * torch.finfo(wide).eps * added[name]
        assert ((merged.double() - value[name]).abs() <= half_ulp + computed).all()
    pl.unmerge(layer, "default")
    assert before == {name: bits(raw(layer, name)) for name in before}


@given(case=layers(), lora=loras, autocast=booleans)
def test_gradients_are_the_explicit_ones(case: Layer, lora: pl.LoRA, autocast: bool) -> None:
    layer, x = case
    w, autocast = layer.weight, autocast and x.dtype is torch.float32
    leaves = [x.requires_grad_(), *disturb(pl.attach(layer, lora)).parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    above = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, above)

    def explicit(of: Callable[[Tensor], Tensor]) -> Sequence[Tensor]:
        x, a, b = doubles = [of(t.detach().double()).requires_grad_() for t in leaves]
        y = F.linear(x, of(w.double()) + factor(lora) * (b @ a))
        return torch.autograd.grad(y, doubles, of(above.double()))

    for ours, *target in zip(got, explicit(itself), explicit(torch.abs), strict=True):
        within(ours, target, y.dtype, *(leaf.dtype for leaf in leaves))


@given(data=st.data(), case=layers())
def test_a_file_holds_every_bit(data, case: Layer) -> None:
    layer, x = case
    delta = disturb(pl.attach(layer, data.draw(methods(layer))))
    y = layer(x)
    with tempfile.TemporaryDirectory() as folder:
        pl.save(delta, Path(folder, "file"))
        pl.detach(layer, "default")
        loaded = pl.load(layer, Path(folder, "file"), trainable=True)
    ours, theirs = delta.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype and bits(ours[key]) == bits(theirs[key])
    assert bits(layer(x)) == bits(y)


@given(data=st.data(), case=layers())
def test_deltas_add_up_in_any_order(data, case: Layer) -> None:
    layer, x = case
    for name in "abc":
        disturb(pl.attach(layer, data.draw(methods(layer)), name))
    for n in range(4):
        for names in itertools.permutations("abc", n):
            pl.use(layer, names)
            within(layer(x), exact(layer, [pl.deltas(layer)[name] for name in names], x))


@given(data=st.data(), case=layers(st.just(torch.float32)))
def test_autocast(data, case: Layer) -> None:
    layer, x = case
    delta = disturb(pl.attach(layer, data.draw(methods(layer))))
    with torch.autocast("cpu", torch.bfloat16):
        call, value = layer(x), F.linear(x, layer.weight, layer.bias)
    assert call.dtype == value.dtype == torch.bfloat16
    within(call, exact(layer, [delta], x))
    within(value, exact(layer, [delta], x))
    call.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in delta.parameters())


@given(call=any_call, r=st.integers(1, 3))
def test_lora_on_any_map(call: maps.Call, r: int) -> None:
    module, w = call.module, call.module.weight.detach().clone()
    placed = disturb(pl.attach(module, pl.LoRA(rank=r, targets="weight"))).placed["weight"]
    d = change(placed.patch)
    explicit = w + (d.mT if placed.site.layout.transposed else d).reshape(w.shape)
    y = module(call.input, **call.kwargs)
    close(module.weight.clone(), explicit)
    pl.use(module, None)
    close(y, call.run(call.input, weight=explicit))


# -- how a delta begins


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", "pissa", "olora"])
@given(data=st.data(), call=any_call)
def test_a_fresh_delta_is_exactly_nothing_and_as_its_paper_says(init, data, call) -> None:
    module, w = call.module, call.module.weight.detach().clone()
    module.requires_grad_(False)  # torch picks its kernels by that
    y = call.run(call.input)
    r = data.draw(st.integers(1, min(w.flatten(1).shape)))
    how = {name: data.draw(strategy) for name, strategy in scales.items()}
    delta = pl.attach(module, pl.LoRA(rank=r, init=init, targets="weight", **how))
    assert torch.equal(module(call.input, **call.kwargs), y)
    assert torch.equal(module.weight.clone(), w)
    t, site = delta.state_dict(), delta.placed["weight"].site
    a, b, w = t["weight:a"], t["weight:b"], w.flatten(1)
    begins(init, r, factor(delta.methods[0]), a, b, w.mT if site.layout.transposed else w)


def begins(init: str, r: int, s: float, a: Tensor, b: Tensor, w: Tensor) -> None:
    """What the papers say of A (r, i), B (o, r) and W (o, i) at first."""
    if init == "pissa":  # the first singular directions, shared out evenly
        u, spectrum, v = torch.linalg.svd(w, full_matrices=False)
        close(s * b @ a, u[:, :r] * spectrum[:r] @ v[:r])
        close(b.mT @ b, torch.diag(spectrum[:r] / s))
        close(a @ a.mT, torch.diag(spectrum[:r] / s))
    elif init == "olora":  # W's part in the span of its first r columns
        close(b.mT @ b, torch.eye(r, dtype=w.dtype))
        close(b @ a, b @ b.mT @ w)
        close((b @ a)[:, :r], w[:, :r])
    else:
        assert not (a.any() and b.any())


@pytest.mark.parametrize("init", ["pissa", "olora"])
@given(case=layers())
def test_a_small_step_from_fixed_factors_counts(init, case: Layer) -> None:
    layer, x = case
    delta = pl.attach(layer, pl.LoRA(rank=1, init=init))
    with torch.no_grad():
        for p in layer.parameters(recurse=False):
            p.zero_()  # the change alone is left
        for p in delta.parameters():
            p.mul_(1 + 1e-4 * torch.randn_like(p))
    within(layer(x), exact(layer, [delta], x))


@given(seed=seeds, r=st.integers(1, 8), i=st.integers(8, 300))
def test_the_random_inits(seed: int, r: int, i: int) -> None:
    torch.manual_seed(seed)
    a = {}
    for init in ("kaiming", "gaussian", "orthogonal"):
        delta = pl.attach(nn.Linear(i, 9), pl.LoRA(rank=r, init=init))
        a[init], b = delta.state_dict().values()
        assert not b.any()
    assert a["kaiming"].abs().max() <= i**-0.5
    torch.testing.assert_close(a["orthogonal"] @ a["orthogonal"].mT, torch.eye(r))
    # the standard deviations, to 6 of their own
    for init, sigma in (("kaiming", (3 * i) ** -0.5), ("gaussian", 1 / r)):
        assert abs(a[init].square().mean().sqrt() / sigma - 1) < 6 * (2 * r * i) ** -0.5


# -- dropout


@given(case=layers(st.just(torch.float64)), lora=loras, p=st.floats(0.1, 0.9), seed=seeds)
def test_dropout_drops_inputs_of_the_delta_alone(case, lora, p, seed) -> None:
    layer, x = case
    delta = disturb(pl.attach(layer, pl.LoRA(rank=lora.rank, dropout=p)))
    w, d = raw(layer, "weight").clone(), change(delta.placed["weight"].patch)
    base = F.linear(x, w, layer.bias)
    close(layer.eval()(x), base + F.linear(x, d))
    layer.train()
    for got, expected in (
        (lambda: layer(x), lambda: base + F.linear(F.dropout(x, p), d)),
        (lambda: layer.weight.clone(), lambda: w + d * F.dropout(torch.ones_like(d[:1]), p)),
    ):
        torch.manual_seed(seed)
        ours = got()
        torch.manual_seed(seed)
        close(ours, expected())
    pl.merge(layer, "default")
    close(raw(layer, "weight"), w + d)


@pytest.mark.heavy
@settings(max_examples=10)
@given(case=layers(st.just(torch.float64)), p=st.floats(0.1, 0.9), seed=seeds)
def test_dropout_changes_no_expected_value(case: Layer, p: float, seed: int) -> None:
    layer, x = case
    w = layer.weight
    delta = disturb(pl.attach(layer, pl.LoRA(rank=2, dropout=p)))
    d, n = change(delta.placed["weight"].patch), 1000
    torch.manual_seed(seed)
    layer.train()
    x = torch.randn(layer.in_features, dtype=torch.float64)
    calls = layer(x.expand(n, -1)) - F.linear(x, w, layer.bias)
    reads = torch.stack([layer.weight - w for _ in range(n)])
    for drawn, parts in ((calls, d * x), (reads, d[..., None])):
        sigma = (p / (1 - p) / n * parts.square().sum(-1)).sqrt()
        assert ((drawn.mean(0) - parts.sum(-1)).abs() <= 6 * sigma).all()


# -- torch.func and higher derivatives


class Reads(nn.Module):
    """A Linear's work, done by reading its weight and bias."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


@st.composite
def functions(draw: st.DrawFn) -> tuple[Callable, Callable, dict[str, Tensor], Tensor]:
    """An attached layer as a function of its delta's parameters, the same explicitly, and both."""
    layer, x = draw(layers(st.just(torch.float64)))
    model = nn.Sequential(draw(st.sampled_from([itself, Reads]))(layer), nn.Tanh())
    w, bias = layer.weight, layer.bias
    method = pl.LoRA(rank=draw(st.integers(1, 3)), alpha=3, targets="*weight")
    full = pl.FullTuning(targets="*bias")
    disturb(pl.attach(model, method if bias is None else [method, full]))
    values = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def attached(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, values, (x,))

    def explicit(values: dict[str, Tensor], x: Tensor) -> Tensor:
        a, b, *d = values.values()
        return F.linear(x, w + factor(method) * (b @ a), bias + d[0] if d else bias).tanh()

    return attached, explicit, values, x


def transforms(f: Callable, values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """What torch.func makes of a function of tensors by name."""
    stacked = {k: torch.stack([v, -2 * v, v.sin()]) for k, v in values.items()}
    grad = torch.func.grad(lambda v: f(v, x).square().sum())
    return {
        "vmap": torch.vmap(f, (0, None))(stacked, x),
        "jvp": torch.func.jvp(lambda v: f(v, x), (values,), (values,))[1],
        **{f"grad {k}": v for k, v in grad(values).items()},
        **{f"vmap of grad {k}": v for k, v in torch.vmap(grad)(stacked).items()},
    }


# torch's own forward mode still scripts its decompositions
@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@given(case=functions())
def test_torch_func(case) -> None:
    attached, explicit, *point = case
    expected = transforms(explicit, *point)
    for name, got in transforms(attached, *point).items():
        close(got, expected[name])


@settings(max_examples=15)
@given(case=functions())
def test_derivatives_of_both_orders(case) -> None:
    attached, _, values, x = case
    assume(x.numel() <= 12)
    inputs = [t.clone().requires_grad_() for t in (x, *values.values())]

    def f(x: Tensor, *tensors: Tensor) -> Tensor:
        return attached(dict(zip(values, tensors, strict=True)), x)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


# -- the verbs in any order

NAMES = "abc"
Choice = str | list[str] | None


def likely(candidates: Callable[["Verbs"], Iterable[str]]) -> st.SearchStrategy[str]:
    """Any name, but most often one that the machine has a use for."""
    return st.runner().flatmap(
        lambda machine: st.sampled_from([*sorted(candidates(machine)) * 4, *NAMES])
    )


free = likely(lambda machine: set(NAMES) - machine.deltas.keys())
there = likely(lambda machine: machine.deltas)
apart = likely(lambda machine: machine.unmerged)
merged = likely(lambda machine: machine.merged)
saved = likely(lambda machine: machine.files)
choices = st.none() | apart | st.lists(apart, max_size=3)
deltas = st.sampled_from(
    [
        pl.LoRA(rank=1, targets="*weight"),
        pl.LoRA(rank=2, init="pissa", targets="2"),
        pl.BitFit(),
        pl.FullTuning(targets="2"),
        [pl.LoRA(rank=1, targets="0.weight[1:3]"), pl.BitFit(targets="2")],
    ]
)


def allowed(legal: bool) -> AbstractContextManager:
    """Runs its body; what isn't legal has to raise, and the rest of the body is left out."""
    return nullcontext() if legal else pytest.raises(pl.PeftliteError)


def stored(model: nn.Module, addresses: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of the base as they lie in memory."""
    parameters = dict(model.named_parameters())
    return {address: parameters[address].detach().clone() for address in addresses}


def prints(model: nn.Module, addresses: Iterable[str]) -> dict[str, bytes]:
    return {address: bits(tensor) for address, tensor in stored(model, addresses).items()}


class Verbs(RuleBasedStateMachine):
    """Every verb on one model, legal or not, against what the model should hold, in plain dicts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.model[0].bias.requires_grad_(False)
        self.plain = copy.deepcopy(self.model)
        self.x = torch.randn(4, 3, dtype=torch.float64)
        self.base = stored(self.model, ["0.weight", "0.bias", "2.weight", "2.bias"])
        self.deltas: dict[str, dict[str, Tensor]] = {}  # what each adds, by address
        self.trainable: dict[str, bool] = {}
        self.chosen: set[str] = set()
        self.merged: dict[str, bool] = {}  # and whether it was chosen then
        self.drop_view()
        self.files: dict[str, tuple[dict[str, Tensor], dict[str, bytes]]] = {}
        self.folder = tempfile.TemporaryDirectory()

    # what should be

    def tensors(self, *changes: dict[str, Tensor]) -> dict[str, Tensor]:
        """The base, what is merged, and the changes."""
        found = dict(self.base)
        for change in (*map(self.deltas.get, self.merged), *changes):
            for address, d in change.items():
                found[address] = found[address] + d
        return found

    def output(self, choice: Choice) -> Tensor:
        tensors = self.tensors(*(self.deltas[name] for name in choice or ()))
        return functional_call(self.plain, tensors, (self.x,))

    @property
    def unmerged(self) -> set[str]:
        """The deltas that aren't merged."""
        return self.deltas.keys() - self.merged.keys()

    @property
    def mergeable(self) -> set[str]:
        """The deltas that no view would apply a second time."""
        return self.unmerged - self.seen

    def choosable(self, choice: Choice) -> bool:
        once = choice is None or len(set(choice)) == len(choice)
        return bool(self.deltas) and once and set(choice or ()) <= self.unmerged

    def explicit(self, delta: pl.Delta) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for address, placed in delta.placed.items():
            whole = whole_address(address)
            d = found.setdefault(whole, torch.zeros_like(self.base[whole]))
            dim, start, stop = placed.site.index or (0, 0, len(d))
            d.narrow(dim, start, stop - start).add_(change(placed.patch))
        return found

    def enter(self, delta: pl.Delta, trainable: bool) -> None:
        name = delta.name
        self.deltas[name], self.trainable[name] = self.explicit(delta), trainable
        self.chosen = {name}

    def leave(self, name: str) -> None:
        del self.deltas[name], self.trainable[name]
        self.chosen.discard(name)
        if name in self.seen:
            self.drop_view()

    def drop_view(self) -> None:
        self.face: nn.Module | None = None
        self.seen: set[str] = set()

    # the verbs

    @initialize(methods=st.tuples(deltas, deltas))
    def begin(self, methods):
        for name, method in zip(NAMES, methods, strict=False):
            self.attach(name, method)

    @precondition(lambda self: len(self.deltas) < len(NAMES))
    @rule(name=free, method=deltas)
    def attach(self, name, method):
        with allowed(name not in self.deltas):
            self.enter(disturb(pl.attach(self.model, method, name)), trainable=True)

    @precondition(lambda self: len(self.deltas) < len(NAMES))
    @rule(weights=st.dictionaries(there, st.sampled_from([0.7, -1.0, 2.0]), max_size=3), name=free)
    def combine(self, weights, name):
        with allowed(weights and {*weights} <= {*self.deltas} and name not in self.deltas):
            made = pl.combine(self.model, weights, name=name)
            parts = [(w, self.deltas[other]) for other, w in weights.items()]
            self.enter(made, trainable=False)
            for address, d in self.deltas[name].items():
                close(d, sum(w * of.get(address, torch.zeros_like(d)) for w, of in parts))
            assert {*self.deltas[name]} == {address for _, of in parts for address in of}

    @precondition(lambda self: self.deltas)
    @rule(name=there)
    def detach(self, name):
        with allowed(name in self.deltas):
            pl.detach(self.model, name)
            self.merged.pop(name, None)
            self.leave(name)

    @rule(choice=choices)
    def use(self, choice):
        with allowed(self.choosable(choice)):
            pl.use(self.model, choice)
            self.chosen = set(choice or ())

    @rule(rows=st.lists(choices, min_size=4, max_size=4))
    def using(self, rows):
        with allowed(all(map(self.choosable, rows))):
            with pl.using(self.model, rows=rows):
                y = self.model(self.x)
                with pl.using(self.model, rows[0]):
                    close(self.model(self.x), self.output(rows[0]))
            for i, row in enumerate(rows):
                close(y[i], self.output(row)[i])

    @rule(choice=choices)
    def view(self, choice):
        with allowed(self.choosable(choice)):
            self.face, self.seen = pl.view(self.model, choice), set(choice or ())
            assert {*map(id, self.face.parameters())} == {*map(id, self.model.parameters())}
            with pytest.raises(pl.PeftliteError):
                pl.use(self.face, None)

    @rule(name=apart)
    def train(self, name):
        if name in self.unmerged:
            self.deltas[name] = self.explicit(disturb(pl.deltas(self.model)[name]))

    @rule(name=there, flag=booleans)
    def freeze(self, name, flag):
        if name in self.deltas:
            pl.deltas(self.model)[name].requires_grad_(flag)
            self.trainable[name] = flag

    @precondition(lambda self: self.unmerged)
    @rule(name=apart)
    def merge(self, name):
        with allowed(name in self.mergeable):
            pl.merge(self.model, name)
            self.merged[name] = name in self.chosen
            self.chosen.discard(name)

    @precondition(lambda self: self.unmerged)
    @rule(name=apart)
    def merge_for_good(self, name):
        taken = {address for other in self.merged for address in self.deltas[other]}
        with allowed(name in self.mergeable and taken.isdisjoint(self.deltas[name])):
            pl.merge(self.model, name, backup="none")
            for address, now in stored(self.model, self.deltas[name]).items():
                close(now, self.base[address] + self.deltas[name][address])
                self.base[address] = now
            self.leave(name)

    @precondition(lambda self: self.merged)
    @rule(name=merged)
    def unmerge(self, name):
        with allowed(name in self.merged):
            pl.unmerge(self.model, name)
            self.chosen |= {name} if self.merged.pop(name) else set()

    @rule(name=there)
    def save(self, name):
        if name not in self.deltas:
            return
        pl.save(pl.deltas(self.model)[name], Path(self.folder.name, name))
        without = copy.deepcopy(self.model)
        if name in self.merged:
            pl.unmerge(without, name)
        self.files[name] = self.deltas[name], prints(without, self.deltas[name])

    @precondition(lambda self: self.files)
    @rule(file=saved, name=free, trainable=booleans)
    def load(self, file, name, trainable):
        added, base = self.files.get(file, ({}, None))
        with allowed(name not in self.deltas and prints(self.model, added) == base):
            path = Path(self.folder.name, file)
            self.enter(pl.load(self.model, path, name, trainable=trainable), trainable)
            assert {k: bits(d) for k, d in self.deltas[name].items()} == {
                k: bits(d) for k, d in added.items()
            }

    @rule(how=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def go_on_with_a_copy(self, how):
        self.drop_view()
        model, self.model = self.model, how(self.model)  # which shares nothing
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()

    # what holds at every moment

    @invariant()
    def outputs(self):
        close(self.model(self.x), self.output(self.chosen))
        if self.face is not None:
            close(self.face(self.x), self.output(self.seen))

    @invariant()
    def base_bits(self):
        expected = self.tensors()
        for address, now in stored(self.model, self.base).items():
            close(now, expected[address])
            if not any(address in self.deltas[name] for name in self.merged):
                assert bits(now) == bits(self.base[address])

    @invariant()
    def requires_grad(self):
        plain = dict(self.plain.named_parameters())
        for name, parameter in self.model.named_parameters():
            if ".peftlite." not in name:
                assert parameter.requires_grad == (plain[name].requires_grad and not self.deltas)
        for name, delta in pl.deltas(self.model).items():
            assert all(p.requires_grad == self.trainable[name] for p in delta.parameters())

    @invariant()
    def keys(self):
        assert list(pl.deltas(self.model)) == list(self.deltas)
        keys = list(self.model.state_dict())
        assert [key for key in keys if ".peftlite." not in key] == list(self.base)
        of_deltas = {
            f"{module}.peftlite.{name}.{slot}.{key}"
            for name, delta in pl.deltas(self.model).items()
            for address, placed in delta.placed.items()
            for module, _, slot in [address.partition(".")]
            for key in placed.patch.state_dict()
        }
        assert {key for key in keys if ".peftlite." in key} == of_deltas

    def teardown(self):
        for name in self.deltas:
            pl.detach(self.model, name)
        for ours, theirs in zip(self.model.modules(), self.plain.modules(), strict=True):
            assert type(ours) is type(theirs) and vars(ours).keys() == vars(theirs).keys()
        for name, parameter in self.plain.named_parameters():
            assert bits(self.model.get_parameter(name)) == bits(self.base[name])
            assert self.model.get_parameter(name).requires_grad == parameter.requires_grad
        self.folder.cleanup()


TestVerbs = pytest.mark.heavy(Verbs.TestCase)
TestVerbs.settings = settings(stateful_step_count=100)  # deep enough for three deltas
