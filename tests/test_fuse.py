"""fuse: which maps it finds, the same results to rounding, and everything else as without it."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftlite as pl
from peftlite import kernels
from peftlite.kernels import torch_ops
from peftlite.verbs.fuse import called_alike, fuse, unfuse
from tests.cells import disturb
from tests.zoo import KINDS

KIND = {kind.name: kind for kind in KINDS}


@pytest.fixture(autouse=True, scope="module")
def at_any_size() -> Iterator[None]:
    with kernels.backend("torch"):
        yield


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks of the products x Aᵀ of several maps, as they run."""
    ran: list[int] = []
    own = torch_ops.shrink

    def shrink(x: Tensor, a: Tensor, *rest) -> Tensor:
        if len(a) > 2:
            ran.append(len(a))
        return own(x, a, *rest)

    monkeypatch.setattr(torch_ops, "shrink", shrink)
    return ran


class Block(nn.Module):
    """Attention's three and its output, and a gated MLP, all of one width."""

    def __init__(self):
        super().__init__()
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            self.add_module(name, nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + self.o(torch.softmax(q @ k.mT, -1) @ v)
        return x + self.down(torch.tanh(self.gate(x)) * self.up(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x


GROUPS = [
    (f"blocks.{n}.{a}", *(f"blocks.{n}.{b}" for b in rest))
    for n in range(2)
    for a, *rest in (("q", "k", "v"), ("gate", "up"))
]
PRODUCTS = [6, 4] * 2  # q/k/v and gate/up of two blocks, at rank 2


def made(method: pl.Method | None = None, names: tuple[str, ...] = ("sql",)) -> Model:
    model = Model().double()
    for name in names:
        disturb(pl.attach(model, method or pl.LoRA(rank=2), name))
    return model


def some() -> Tensor:
    return torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x.grad = None
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_same(model: nn.Module, x: Tensor, true: list[Tensor]) -> None:
    for found, expected in zip(gradients(model, x), true, strict=True):
        torch.testing.assert_close(found, expected)


class TestFinding:
    def test_reads_it_in_the_source(self) -> None:
        model = made()
        found = fuse(model)
        assert found.groups == GROUPS and not found.unread
        assert str(found).splitlines()[2].split() == ["blocks.0", "q", "k", "v"]

    def test_names_are_given(self) -> None:
        model = made()
        assert fuse(model, [["v", "k"]]).groups == [
            ("blocks.0.v", "blocks.0.k"),
            ("blocks.1.v", "blocks.1.k"),
        ]
        gate, k = model.blocks[0].gate, model.blocks[0].k
        assert k.peftlite.sql.by_slot["weight"][0].group
        assert not gate.peftlite.sql.by_slot["weight"][0].group

    @pytest.mark.parametrize(
        ("kind", "groups"), [("gpt", 2), ("hf_llama", 4), ("hf_vit", 2), ("hf_gpt2", 0)]
    )
    def test_in_models_of_every_kind(self, kind: str, groups: int) -> None:
        model = KIND[kind].model()
        pl.attach(model, pl.LoRA(rank=2))
        assert len(fuse(model).groups) == groups

    def test_every_delta_s(self) -> None:
        model = made(names=("sql", "chat"))
        assert fuse(model).groups == GROUPS
        pl.detach(model, "sql")
        assert fuse(model).groups == GROUPS

    def test_only_maps_that_are_patched(self) -> None:
        model = Model()
        pl.attach(model, pl.LoRA(rank=2, targets=["q", "v", "gate"]))
        assert fuse(model).groups == [("blocks.0.q", "blocks.0.v"), ("blocks.1.q", "blocks.1.v")]

    @pytest.mark.parametrize(
        "method", [pl.LoRA(rank=2, init="pissa"), pl.VeRA(rank=2), pl.LoHa(rank=2)]
    )
    def test_a_factor_that_is_made_for_a_call_is_none(self, method: pl.Method) -> None:
        assert not fuse(made(method)).groups

    def test_says_what_it_could_not_read(self) -> None:
        space: dict = {"nn": nn}
        exec(
            "class Pair(nn.Module):\n    def forward(self, x): return self.a(x) + self.b(x)", space
        )
        model = nn.Sequential(space["Pair"]())
        model[0].a, model[0].b = nn.Linear(4, 4), nn.Linear(4, 4)
        pl.attach(model, pl.LoRA(rank=2))
        found = fuse(model)
        assert found.unread == ["0"] and "no source" in str(found)
        assert fuse(model, [["a", "b"]]).groups == [("0.a", "0.b")]


def same(self, x):
    return self.q(x) + self.k(x)


def assigned_between(self, x):
    q = self.q(x)
    x = self.norm(x)
    return q + self.k(x) + self.v(x)


def chained(self, x):
    x = self.a(x)
    x = self.b(x)
    x += self.c(x)
    return self.d(x)


def walrus(self, x):
    return self.a(x) + self.b(y := self.c(x)) + self.d(y)


def other(self, x, y):
    return self.q(x) + self.k(y) + y.v(x) + self.q2(x + 1) + self.attend(key=x)


@pytest.mark.parametrize(
    ("forward", "groups"),
    [
        (same, [["q", "k"]]),
        (assigned_between, [["q", "norm"], ["k", "v"]]),
        (chained, [["a"], ["b"], ["c"], ["d"]]),
        (walrus, [["a", "c"], ["d"]]),
        (other, [["q"], ["k"]]),
        (len, None),
    ],
)
def test_what_a_forward_calls_alike(forward: Callable, groups: list | None) -> None:
    assert called_alike(forward) == groups


@pytest.mark.parametrize(
    "method", [pl.LoRA(rank=2), pl.DoRA(rank=2), pl.LoRA(rank=2, freeze_a=True)]
)
def test_results_are_the_same_to_rounding(products: list[int], method: pl.Method) -> None:
    model, x = made(method), some()
    true = gradients(model, x)
    fuse(model)
    products.clear()
    assert_same(model, x, true)
    assert products == PRODUCTS
    unfuse(model)
    assert all(map(torch.equal, gradients(model, x), true))


def test_unfuse_leaves_nothing() -> None:
    model = made()
    patches = [m for m in model.modules() if isinstance(m, pl.Patch)]
    before = [list(vars(patch)) for patch in patches]
    fuse(model)
    unfuse(model)
    assert [list(vars(patch)) for patch in patches] == before


def test_dropout_drops_the_same_for_all(products: list[int]) -> None:
    model = made(pl.LoRA(rank=2, dropout=0.5)).train()
    fuse(model)
    x = some()
    torch.manual_seed(0)
    true = gradients(model, x)
    assert products == PRODUCTS
    model.checkpointing = True
    torch.manual_seed(0)
    assert all(map(torch.equal, gradients(model, x), true))
    model.blocks[0].k.eval()  # another dropout, so it goes its own way
    model.checkpointing = False
    products.clear()
    model(x)
    assert products[:1] == [4]


def test_checkpointing(products: list[int]) -> None:
    model, x = made(), some()
    fuse(model)
    true = gradients(model, x)
    products.clear()
    model.checkpointing = True
    assert all(map(torch.equal, gradients(model, x), true))
    assert sorted(products) == sorted(PRODUCTS * 2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_fused_by_itself(products: list[int], copied: Callable) -> None:
    model, x = made(), some()
    fuse(model)
    twin = copied(model)
    true = gradients(model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    products.clear()
    assert_same(twin, x, true)
    assert products == PRODUCTS
    unfuse(model)
    products.clear()
    twin(x)
    assert products == PRODUCTS


def test_files_and_merging_do_not_see_it(tmp_path) -> None:
    model, x = made(), some()
    plain = model(x)
    pl.save(pl.deltas(model)["sql"], tmp_path / "a.safetensors")
    fuse(model)
    pl.save(pl.deltas(model)["sql"], tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    pl.merge(model, "sql")
    torch.testing.assert_close(model(x), plain)
    pl.unmerge(model, "sql")
    torch.testing.assert_close(model(x), plain)


def test_detaching_lets_go() -> None:
    model, bare = Model().double(), Model().double()
    model.load_state_dict(bare.state_dict())
    disturb(pl.attach(model, pl.LoRA(rank=2), "sql"))
    fuse(model)
    pl.detach(model, "sql")
    assert [type(m) for m in model.modules()] == [type(m) for m in bare.modules()]
    x = some()
    assert torch.equal(model(x), bare(x))


def test_every_choice(products: list[int]) -> None:
    model, x = made(names=("sql", "chat")), some()
    choices = (None, "sql", "chat", ["sql", "chat"])
    rows = ["sql", None, "chat"]

    def results() -> list[Tensor]:
        found = []
        for names in choices:
            with pl.using(model, names):
                found.append(model(x))
            found.append(pl.view(model, names)(x))
        with pl.using(model, rows=rows):
            found.append(model(x))
        return found

    true = results()
    fuse(model)
    products.clear()
    for found, expected in zip(results(), true, strict=True):
        torch.testing.assert_close(found, expected)
    # three choices, twice, and two that have rows; the second of two deltas rides on the first
    assert products == PRODUCTS * (3 * 2 + 2)


def test_threads_do_not_meet() -> None:
    model = made(names=("sql", "chat"))
    x = some().detach()  # the very same tensor in all
    true = {}
    for name in ("sql", "chat"):
        with pl.using(model, name):
            true[name] = model(x)
    fuse(model)
    wrong: list[str] = []

    def run(name: str) -> None:
        for _ in range(20):
            with pl.using(model, name), torch.no_grad():
                if not torch.allclose(model(x), true[name], atol=1e-6):
                    wrong.append(name)

    threads = [threading.Thread(target=run, args=(n,)) for n in ("sql", "chat") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.heavy
def test_compiled_code_is_as_without_it() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    x, codes = some(), []
    model = made()
    for change in (lambda _: None, fuse):
        change(model)
        torch.compiler.reset()
        graphs.clear()
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True, backend=backend)(x), model(x)
        )
        codes.append([graph.code for graph in graphs])
    assert codes[0] == codes[1] and len(codes[0]) == 1


def test_a_step_of_training_is_the_same() -> None:
    def trained(change: Callable) -> list[Tensor]:
        torch.manual_seed(0)
        model, x = made(), some()
        change(model)
        delta = pl.deltas(model)["sql"]
        optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            nn.utils.clip_grad_norm_(list(delta.parameters()), 1.0)
            optimizer.step()
        return [p.detach() for p in delta.parameters()]

    for found, true in zip(trained(fuse), trained(lambda _: None), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-6)
