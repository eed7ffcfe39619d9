"""Maps that share an input: the reference's values and gradients, and who goes its own way."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from peftlite import kernels
from peftlite.kernels import grouped, lora_linear, reference, torch_ops
from peftlite.kernels.grouped import grouped_linear
from tests.kernels.against import assert_close


@pytest.fixture(autouse=True, scope="module")
def at_any_size() -> Iterator[None]:
    with kernels.backend("torch"):
        yield


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the operations that read all of x, as they run."""
    ran: list[str] = []
    for name in ("shrink", "back"):
        own = getattr(torch_ops, name)
        monkeypatch.setattr(
            torch_ops, name, lambda *args, _n=name, _f=own: ran.append(_n) or _f(*args)
        )
    return ran


class Group:
    """q, k and v: their weights, and how to call one of them."""

    def __init__(self, i: int = 12, o: int = 9, ranks: tuple[int, ...] = (2, 3, 4), bias=True):
        def positive(*shape: int) -> Tensor:  # nothing cancels, as in `against.factors`
            return torch.randint(1, 65, shape).double() / 64

        self.w = [positive(o + k, i) for k in range(len(ranks))]
        self.bias = [positive(o + k) if bias else None for k in range(len(ranks))]
        self.a = [positive(r, i).requires_grad_() for r in ranks]
        self.b = [positive(o + k, r).requires_grad_() for k, r in enumerate(ranks)]
        self.scale, self.dropout = 0.5, 0.0

    def to(self, dtype: torch.dtype, factors: torch.dtype) -> "Group":
        self.w = [w.to(dtype) for w in self.w]
        self.bias = [None if bias is None else bias.to(dtype) for bias in self.bias]
        self.a, self.b = (
            [t.detach().to(factors).requires_grad_() for t in own] for own in (self.a, self.b)
        )
        return self

    def __call__(self, k: int, x: Tensor) -> Tensor:
        own = self.w[k], self.bias[k], self.a[k], self.b[k]
        return grouped_linear(lambda: self.a, x, *own, self.scale, self.dropout)

    def alone(self, k: int, x: Tensor, seed: Tensor | None = None) -> Tensor:
        own = self.w[k], self.bias[k], self.a[k], self.b[k]
        return reference.lora_linear(x, *own, self.scale, self.dropout, seed)

    def run(self, call: Callable[..., Tensor], x: Tensor, *args: Tensor) -> dict[str, Tensor]:
        """The results and gradients of all three, by name."""
        for t in (x, *self.a, *self.b):
            t.grad = None
        ys = [call(k, x, *args) for k in range(len(self.w))]
        torch.autograd.backward(ys, [_weights(y) for y in ys])
        found = {f"y{k}": y.detach() for k, y in enumerate(ys)} | {"x": x.grad}
        for name, own in (("a", self.a), ("b", self.b)):
            found |= {f"{name}{k}": t.grad for k, t in enumerate(own)}
        return found


def _weights(y: Tensor) -> Tensor:
    """A gradient that every dtype holds exactly."""
    return (torch.arange(y.numel()) % 7 / 4 + 1).view(y.shape).to(y.dtype)


def some(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randint(1, 65, shape).double() / 64).to(dtype).requires_grad_()


@given(
    shape=st.sampled_from([(), (1,), (7,), (0,), (2, 3), (2, 1, 3)]),
    i=st.integers(1, 40),
    o=st.integers(1, 40),
    ranks=st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple),
    bias=st.booleans(),
    dropout=st.sampled_from([0.0, 0.4]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    wide=st.booleans(),
)
def test_is_the_reference(shape, i, o, ranks, bias, dropout, dtype, wide) -> None:
    group, x = Group(i, o, ranks, bias), some(*shape, i)
    group.dropout = dropout
    torch.manual_seed(i)
    seed = torch.randint(2**62, ())
    true = group.run(group.alone, x, seed)
    group.to(dtype, torch.promote_types(dtype, torch.float32) if wide else dtype)
    torch.manual_seed(i)
    assert_close(group.run(group, x.detach().to(dtype).requires_grad_()), true)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_reads_x_once(products: list[str], graph: bool, order: tuple[int, ...]) -> None:
    group, x = Group(), some(5, 12)
    with torch.set_grad_enabled(graph):
        ys = [group(k, x) for k in order]
    assert products == ["shrink"]
    if graph:
        sum(y.sum() for y in ys).backward()
        assert products == ["shrink", "back"]


def test_a_second_round_is_a_group_again(products: list[str]) -> None:
    group, x = Group(), some(5, 12)
    ys = [group(k, x) for k in (0, 1, 2, 0, 1, 2)]
    assert len(ys) == 6
    assert products == ["shrink"] * 2


class TestWhoGoesItsOwnWay:
    """What isn't the very same product is formed anew."""

    @pytest.fixture
    def group(self) -> Group:
        return Group()

    def check(self, group: Group, products: list[str], x: Tensor) -> None:
        products.clear()
        torch.testing.assert_close(group(1, x), group.alone(1, x))
        assert products == ["shrink"]

    def test_another_tensor(self, group: Group, products: list[str]) -> None:
        first = group(0, some(5, 12))
        self.check(group, products, some(5, 12))
        del first

    def test_one_that_was_changed(self, group: Group, products: list[str]) -> None:
        x = some(5, 12).detach()
        first = group(0, x)
        x.mul_(2)
        self.check(group, products, x)
        del first

    def test_one_that_needs_a_gradient_now(self, group: Group, products: list[str]) -> None:
        x = some(5, 12).detach()
        first = group(0, x)
        x.requires_grad_()
        self.check(group, products, x)
        group(1, x).sum().backward()
        assert x.grad is not None
        del first

    def test_a_factor_that_was_changed(self, group: Group, products: list[str]) -> None:
        x = some(5, 12)
        first = group(0, x)
        with torch.no_grad():
            group.a[1].mul_(2)
        self.check(group, products, x)
        del first

    def test_another_factor(self, group: Group, products: list[str]) -> None:
        x = some(5, 12)
        first = group(0, x)
        group.a[1] = group.a[1].detach().clone()
        self.check(group, products, x)
        del first

    def test_another_scale(self, group: Group, products: list[str]) -> None:
        x = some(5, 12)
        first = group(0, x)
        group.scale = 2.0
        self.check(group, products, x)
        del first

    def test_with_a_graph_and_without(self, group: Group, products: list[str]) -> None:
        x = some(5, 12)
        with torch.no_grad():
            group(0, x)
        self.check(group, products, x)
        with torch.no_grad():
            self.check(group, products, x)

    def test_under_autocast_and_not(self, group: Group, products: list[str]) -> None:
        group, x = group.to(torch.float32, torch.float32), some(5, 12, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            first = group(0, x)
        self.check(group, products, x)
        del first

    def test_another_thread(self, group: Group, products: list[str]) -> None:
        x = some(5, 12)
        first = group(0, x)
        products.clear()
        thread = threading.Thread(target=group, args=(1, x))
        thread.start()
        thread.join()
        assert products == ["shrink"]
        group(2, x)  # what was left here is here still
        assert products == ["shrink"]
        del first

    def test_one_of_its_own(self, group: Group, products: list[str]) -> None:
        x = some(5, 12)
        group(0, x)
        made = grouped_linear(
            lambda: [a.clone() for a in group.a],
            x,
            group.w[1],
            group.bias[1],
            group.a[1] * 1,
            group.b[1],
        )
        own = group.w[1], group.bias[1], group.a[1], group.b[1]
        torch.testing.assert_close(made, reference.lora_linear(x, *own))

    def test_factors_that_cant_be_laid_together(self, group: Group, products: list[str]) -> None:
        x = some(5, 12)
        group.a[1] = torch.ones(3, 7)
        group.a[2] = torch.ones(4, 12, dtype=torch.float32)
        torch.testing.assert_close(group(0, x), group.alone(0, x))

    def test_where_python_costs_more(self, group: Group, products: list[str]) -> None:
        x = some(5, 12)
        with kernels.backend(None):
            assert torch.equal(group(0, x), group.alone(0, x))
        assert not products

    def test_a_weight_that_is_trained(self, group: Group) -> None:
        x = some(5, 12)
        group.w[0].requires_grad_()
        group(0, x).sum().backward()
        assert group.w[0].grad is not None

    def test_an_inference_tensor(self, group: Group) -> None:
        with torch.inference_mode():
            x = torch.ones(5, 12, dtype=torch.float64)
            for k in range(3):
                torch.testing.assert_close(group(k, x), group.alone(k, x))

    # torch's own, as it first differentiates forward
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    def test_transforms(self, group: Group) -> None:
        x, group.scale = some(5, 12), 1.0

        def loss(call: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda x: sum(call(k, x).square().sum() for k in range(3))

        found, true = (torch.func.grad(loss(call))(x) for call in (group, group.alone))
        torch.testing.assert_close(found, true)
        found, true = (torch.func.jvp(loss(call), (x,), (x,)) for call in (group, group.alone))
        torch.testing.assert_close(found, true)


class TestLetsGo:
    """x lives no longer than it would have to."""

    def count(self) -> int:
        gc.collect()
        return sum(isinstance(o, Tensor) and o.shape == (5, 77) for o in gc.get_objects())

    @pytest.mark.parametrize("graph", [True, False])
    @pytest.mark.parametrize("autocast", [True, False])
    @pytest.mark.parametrize("called", [(0,), (0, 1), (0, 1, 2)])
    def test_x(self, graph: bool, autocast: bool, called: tuple[int, ...]) -> None:
        group, x = Group(77).to(torch.float32, torch.float32), some(5, 77, dtype=torch.float32)
        gc.disable()
        try:
            with torch.set_grad_enabled(graph), torch.autocast("cpu", enabled=autocast):
                ys = [group(k, x) for k in called]
            alive = weakref.ref(x)
            storage = weakref.ref(x.untyped_storage())
            del x, ys
            assert alive() is None and storage() is None
            assert not grouped._here.group.parts
        finally:
            gc.enable()

    def test_h_when_all_have_theirs(self) -> None:
        group, x = Group(), some(5, 12)
        ys = [group(k, x) for k in range(3)]
        assert not grouped._here.group.parts and len(ys) == 3

    def test_what_is_left_after_the_backward_pass(self) -> None:
        group, x = Group(), some(5, 12) + 1  # a leaf would be held by the graph
        y = group(0, x).sum()
        y.backward()
        storage = weakref.ref(x.untyped_storage())
        del x, group
        assert not grouped._here.group.parts and y.grad_fn is not None and storage() is None

    def test_a_checkpointed_x(self) -> None:
        group, x = Group(), some(5, 12)
        y = checkpoint(group, 0, x, use_reentrant=False)
        y.sum().backward()
        storage = weakref.ref(x.untyped_storage())
        del x, y
        assert storage() is None

    def test_the_factors(self) -> None:
        group, x = Group(), some(5, 12)
        ys = [group(k, x) for k in range(3)]
        factors = [weakref.ref(a) for a in group.a]
        del x, group, ys
        assert not any(factor() is not None for factor in factors)


def test_keeps_x_and_r_numbers_a_token() -> None:
    group, x = Group(30, 40, (4, 6)), some(50, 30)
    own = {t.untyped_storage().data_ptr() for t in (x, *group.w, *group.a, *group.b)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        group(0, x), group(1, x)
    assert sum(count for storage, count in kept.items() if storage not in own) == 50 * 10 * 8


def test_frozen_factors_keep_no_input() -> None:
    group, x = Group(), some(5, 12)
    group.a = [a.detach() for a in group.a]
    kept: list[int] = []
    with saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        ys = [group(k, x) for k in range(3)]
    assert x.data_ptr() not in kept
    sum(y.sum() for y in ys).backward()
    found, x.grad = x.grad, None
    sum(group.alone(k, x).sum() for k in range(3)).backward()
    torch.testing.assert_close(found, x.grad)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2), ()])
def test_some_of_a_group_count(used: tuple[int, ...]) -> None:
    def gradients(call: Callable[..., Tensor]) -> list[Tensor | None]:
        leaves = [x, *group.a, *group.b]
        ys = [call(k, x).sum() for k in range(3)]
        total = sum((ys[k] for k in used), x.sum())
        return list(torch.autograd.grad(total, leaves, allow_unused=True))

    group, x = Group(), some(5, 12)
    for found, true in zip(gradients(group), gradients(group.alone), strict=True):
        assert (found is None) == (true is None)
        if true is not None:
            torch.testing.assert_close(found, true)


def test_the_way_back_can_be_taken_twice() -> None:
    group, x = Group(), some(5, 12)
    total = sum(group(k, x).square().sum() for k in range(3))
    first = torch.autograd.grad(total, [x, *group.a], retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(total, [x, *group.a])))


@pytest.mark.parametrize("together", [True, False])
def test_each_may_go_back_alone(together: bool) -> None:
    group, x = Group(), some(5, 12)
    true = group.run(group.alone, x)
    for t in (x, *group.a, *group.b):
        t.grad = None
    ys = [group(k, x) for k in range(3)] if together else []
    for k in range(3):
        y = ys[k] if together else group(k, x)
        y.backward(_weights(y))
        ys.append(y)
    for name, own in {"x": [x], "a": group.a, "b": group.b}.items():
        for k, t in enumerate(own):
            torch.testing.assert_close(t.grad, true[name if name == "x" else f"{name}{k}"])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_is_differentiable_twice(dropout: float) -> None:
    group, x = Group(4, 3, (2, 1), bias=False), some(3, 4)
    group.dropout = dropout

    def call(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        group.a, group.b = list(factors[:2]), list(factors[2:])
        return group(0, x), group(1, x)

    leaves = [t.detach().clone().requires_grad_() for t in (x, *group.a, *group.b)]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_what_it_gives_may_be_changed_in_place() -> None:
    group, x = Group(), some(2, 5, 12)
    for k in range(3):
        y = group(k, x)
        y += 1
        y.mul_(2).sum().backward()
        torch.testing.assert_close(y, 2 * (group.alone(k, x) + 1))


def test_a_bias_may_be_trained() -> None:
    group, x = Group(), some(2, 5, 12)
    group.bias[0].requires_grad_()
    group(0, x).sum().backward()
    assert torch.equal(group.bias[0].grad, torch.full((9,), 10.0).double())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_groups_alike(products: list[str], dropout: float, reentrant: bool) -> None:
    group, x = Group(), some(9, 12)
    group.dropout = dropout

    def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        leaves = [x, *group.a, *group.b]
        for t in leaves:
            t.grad = None
        run(lambda x: sum(group(k, x).square().sum() for k in range(3)), x).backward()
        return [t.grad for t in leaves]

    plain = gradients(lambda f, x: f(x))
    products.clear()
    again = gradients(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    assert all(map(torch.equal, plain, again))
    assert products == ["shrink", "shrink", "back"]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_maps_may_be_checkpointed_apart(dropout: float) -> None:
    group, x = Group(), some(9, 12)
    group.dropout = dropout
    torch.manual_seed(0)
    seeds = [torch.randint(2**62, ()) for _ in range(3)]
    true = group.run(lambda k, x: group.alone(k, x, seeds[k]), x)
    torch.manual_seed(0)
    found = group.run(lambda k, x: checkpoint(group, k, x, use_reentrant=False), x)
    assert_close(found, true)


def test_is_deterministic() -> None:
    group, x = Group(96, 80, (16, 16)).to(torch.bfloat16, torch.float32), some(64, 96)
    x = x.detach().bfloat16().requires_grad_()
    runs = [group.run(group, x) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_autocast_is_the_base_s() -> None:
    group, x = Group().to(torch.float32, torch.float32), some(7, 12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ys = [group(k, x) for k in range(3)]
        own = group.w[0], group.bias[0], group.a[0], group.b[0]
        torch.testing.assert_close(ys[0], lora_linear(x, *own, group.scale))
    assert ys[0].dtype is torch.bfloat16
    sum(y.float().sum() for y in ys).backward()
    assert x.grad.dtype is group.a[0].grad.dtype is torch.float32
