"""Choosing: `use`, `using`, `view` and `rows=`, in every place that might not see the choice."""

import asyncio
import copy
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._composable.checkpoint_activation import checkpoint as composable_checkpoint
from torch.utils.checkpoint import checkpoint

import peftlite as pl
from peftlite.methods.lora import LoRAPatch
from tests.cells import Graphs, close, disturb, in_threads
from tests.zoo import KINDS, Kind, seeded

KIND = {kind.name: kind for kind in KINDS}
CHOICES = ("a", "b", None)


class Pair:
    """A model with the deltas "a" and "b", which knows what it gives under every choice."""

    def __init__(self, kind: str = "mlp", targets: str | list[str] | None = None):
        torch._dynamo.reset()
        self.kind: Kind = KIND[kind]
        self.model, self.batch = self.kind.model(), self.kind.batch()
        for seed, name in enumerate("ab"):
            with seeded(seed):
                disturb(pl.attach(self.model, pl.LoRA(rank=2, targets=targets), name))
        self.expected = {}
        for name in CHOICES:
            pl.use(self.model, name)
            self.expected[name] = self.run()
        pl.use(self.model, "a")

    def run(self, model: nn.Module | None = None) -> Tensor:
        return self.kind.run(self.model if model is None else model, self.batch)

    def seen(self, model: nn.Module | None = None) -> str | None:
        """The choice that a run shows."""
        return self.shown(self.run(model))

    def shown(self, output: Tensor) -> str | None:
        """The choice that an output shows."""
        nearest = min(CHOICES, key=lambda name: (output - self.expected[name]).abs().max())
        close(output, self.expected[nearest])
        return nearest

    def using(self, names: str | None) -> AbstractContextManager[None]:
        return pl.using(self.model, names)


@pytest.fixture
def pair() -> Pair:
    return Pair()


# -- scopes in plain Python


def test_scopes_nest_and_end(pair: Pair) -> None:
    with pair.using("b"):
        with pair.using(None):
            with pair.using("a"):
                assert pair.seen() == "a"
            assert pair.seen() is None
        assert pair.seen() == "b"
    assert pair.seen() == "a"


def test_an_exception_ends_the_scopes_it_leaves(pair: Pair) -> None:
    with pytest.raises(KeyError), pair.using("b"):
        with pair.using(None):
            raise KeyError
    assert pair.seen() == "a"
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        with pl.using(pair.model, rows=["b", None]):
            pair.model(torch.randn(2, 3))
    assert pair.seen() == "a"


def test_the_standing_choice_under_a_scope(pair: Pair) -> None:
    with pair.using("b"):
        pl.use(pair.model, None)
        assert pair.seen() == "b"
    assert pair.seen() is None


def test_a_choice_leaves_requires_grad_alone(pair: Pair) -> None:
    before = [p.requires_grad for p in pair.model.parameters()]
    pl.use(pair.model, None)
    with pair.using("b"):
        pl.view(pair.model, "b")
        assert [p.requires_grad for p in pair.model.parameters()] == before


def test_threads_in_scopes_at_once(pair: Pair) -> None:
    barrier = threading.Barrier(4)

    def work(choice: AbstractContextManager[None], expected: str | None) -> Callable[[], None]:
        def job() -> None:
            with choice:
                barrier.wait()
                assert pair.seen() == expected
                barrier.wait()

        return job

    in_threads(*(work(pair.using(n), n) for n in CHOICES), work(nullcontext(), "a"))


def test_the_standing_choice_holds_in_every_thread(pair: Pair) -> None:
    in_threads(lambda: pl.use(pair.model, "b"))
    in_threads(lambda: close(pair.run(), pair.expected["b"]))
    assert pair.seen() == "b"


def test_tasks_in_scopes_at_once(pair: Pair) -> None:
    async def work(name: str | None) -> None:
        with pair.using(name):
            for _ in range(5):
                await asyncio.sleep(0)
                assert pair.seen() == name
                assert await asyncio.to_thread(pair.seen) == name

    async def main() -> None:
        await asyncio.gather(*map(work, CHOICES))
        assert pair.seen() == "a"

    asyncio.run(main())


def test_a_task_is_in_the_scope_of_its_maker_until_that_ends(pair: Pair) -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def child() -> None:
            assert pair.seen() == "b"
            await ended.wait()
            assert pair.seen() == "a"
            in_threads(other)
            assert pair.seen() == "a"

        def other() -> None:
            with pair.using(None):
                assert pair.seen() is None

        with pair.using("b"):
            task = asyncio.create_task(child())
            await asyncio.sleep(0)
        ended.set()
        await task

    asyncio.run(main())


def holding(pair: Pair, name: str | None) -> Iterator[str | None]:
    with pair.using(name):
        yield pair.seen()
        yield pair.seen()


def test_a_generator_that_holds_a_scope(pair: Pair) -> None:
    generator = holding(pair, "b")
    assert next(generator) == "b"
    assert pair.seen() == "b"  # a generator has no context of its own
    with pair.using(None):
        generator.close()
        assert pair.seen() is None
    assert pair.seen() == "a"


def test_scopes_that_end_out_of_order_leave_nothing_behind(pair: Pair) -> None:
    for first, second in itertools.permutations((0, 1)):
        generators = holding(pair, "b"), holding(pair, None)
        assert [next(g) for g in generators] == ["b", None]
        generators[first].close()
        assert pair.seen() == ("b", None)[second]
        generators[second].close()
        with ThreadPoolExecutor() as pool, pl.using(pair.model, None):
            # while a scope is open, a thread without one looks for what is left in its context
            assert pool.submit(pair.seen).result() == "a"
        assert pair.seen() == "a"


def test_a_generator_ended_in_another_thread(pair: Pair) -> None:
    generator = holding(pair, "b")
    in_threads(lambda: next(generator))
    assert pair.seen() == "a"
    generator.close()
    assert pair.seen() == "a"


def test_a_copy_made_in_a_scope_is_outside_of_it(pair: Pair) -> None:
    with pair.using("b"):
        twin = copy.deepcopy(pair.model)
        assert pair.seen(twin) == "a"
    assert pair.seen(twin) == "a"


# -- views


def test_views_share_storage(pair: Pair) -> None:
    a, b, base = (pl.view(pair.model, name) for name in CHOICES)
    assert [pair.seen(v) for v in (a, b, base, pair.model)] == ["a", "b", None, "a"]
    assert {p.data_ptr() for p in a.parameters()} == {p.data_ptr() for p in pair.model.parameters()}
    optimizer = torch.optim.SGD(pl.deltas(a)["a"].parameters(), lr=1.0)
    pair.run(a).square().mean().backward()
    optimizer.step()
    trained = pair.run(a)
    assert not torch.equal(trained, pair.expected["a"])
    assert torch.equal(pair.run(), trained)
    assert pair.seen(b) == "b"
    checkpoint = pair.kind.model().state_dict()
    base.load_state_dict({key: 2 * tensor for key, tensor in checkpoint.items()})
    assert torch.equal(pair.model[0]._parameters["weight"], 2 * checkpoint["0.weight"])


def test_a_view_sees_no_other_choice(pair: Pair) -> None:
    view = pl.view(pair.model, "b")
    pl.use(pair.model, None)
    assert pair.seen(view) == "b"
    with pair.using("a"):
        assert pair.seen(view) == "b"
        assert pair.seen(pl.view(view, None)) is None


@pytest.mark.parametrize(
    "verb",
    [
        lambda view: pl.use(view, "a"),
        lambda view: pl.using(view, "a"),
        lambda view: pl.using(view, rows=["a", None]),
        lambda view: pl.attach(view, pl.BitFit(), "c"),
        lambda view: pl.detach(view, "a"),
        lambda view: pl.merge(view, "a"),
    ],
)
def test_a_view_can_not_be_changed(pair: Pair, verb: Callable[[nn.Module], object]) -> None:
    view = pl.view(pair.model, "b")
    with pytest.raises(pl.PeftliteError, match="this is a view, whose choice is fixed"):
        verb(view)
    assert pair.seen(view) == "b"


def test_views_in_threads_compile_once_each(pair: Pair) -> None:
    graphs = Graphs()
    views = {name: pl.view(pair.model, name) for name in CHOICES}
    compiled = {
        name: torch.compile(view, fullgraph=True, backend=graphs) for name, view in views.items()
    }
    for _ in range(3):
        for name in CHOICES:
            assert pair.seen(compiled[name]) == name
    assert graphs.graphs == 3

    def work(name: str | None) -> Callable[[], None]:
        def loop() -> None:
            for _ in range(20):
                assert pair.seen(compiled[name]) == name

        return loop

    in_threads(*map(work, CHOICES))
    assert graphs.graphs == 3


def test_a_view_exports(pair: Pair) -> None:
    with pair.using("a"):
        exported = torch.export.export(pl.view(pair.model, "b"), (), pair.batch)
    assert pair.seen(exported.module()) == "b"


# -- torch.compile


def test_use_compiles_once_per_choice(pair: Pair) -> None:
    graphs = Graphs()
    compiled = torch.compile(pair.model, fullgraph=True, backend=graphs)
    for name in (*CHOICES, "a", None, "b", "a"):
        pl.use(pair.model, name)
        assert pair.seen(compiled) == name
    assert graphs.graphs == 3


# the standing choice, the scope's, and which of them is in force
STATES = [
    (standing, scope, standing if scope == "no scope" else scope)
    for standing in CHOICES
    for scope in (*CHOICES, "no scope")
]
THERE_AND_BACK = [*STATES, *reversed(STATES)]
EVERY_STATE_AFTER_EVERY_STATE = [*itertools.chain(*itertools.product(STATES, STATES))]


def enter(pair: Pair, scope: str | None) -> AbstractContextManager[None]:
    return nullcontext() if scope == "no scope" else pair.using(scope)


@pytest.mark.heavy
def test_a_choice_under_compile_is_never_stale() -> None:
    pair = Pair("mha_encoder")  # it calls its linear maps, and reads weights besides
    compiled = torch.compile(pair.model, backend=Graphs())
    with ThreadPoolExecutor(1) as pool:
        for standing, scope, in_force in EVERY_STATE_AFTER_EVERY_STATE:
            pl.use(pair.model, standing)
            with enter(pair, scope):
                assert pair.seen(compiled) == in_force
                # warm code, and a scope open in another thread
                assert pool.submit(pair.seen, compiled).result() == standing


@pytest.mark.heavy
def test_a_choice_under_fullgraph_is_honoured_or_refused() -> None:
    pair = Pair("mha_encoder")
    compiled = torch.compile(pair.model, backend=Graphs(), fullgraph=True)
    refused = 0
    for standing, scope, in_force in THERE_AND_BACK:
        pl.use(pair.model, standing)
        with enter(pair, scope):
            try:
                assert pair.seen(compiled) == in_force
            except torch._dynamo.exc.Unsupported as error:
                assert scope != "no scope"
                assert "choose with pl.use or pl.view" in str(error)
                refused += 1
    assert refused == 2 * len(CHOICES) ** 2


@pytest.mark.heavy
def test_a_scope_inside_compiled_code() -> None:
    pair, graphs = Pair("mha_encoder"), Graphs()

    @torch.compile(fullgraph=True, backend=graphs)
    def step(name: str | None, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with pl.using(pair.model, name):
            inside = pair.model(**batch)
        return inside, pair.model(**batch)

    for name in (*CHOICES, *CHOICES):
        inside, outside = step(name, pair.batch)
        assert (pair.shown(inside), pair.shown(outside)) == (name, "a")
    assert graphs.graphs == 3


def test_rows_inside_compiled_code(pair: Pair) -> None:
    @torch.compile(fullgraph=True, backend=Graphs())
    def step(x: Tensor) -> Tensor:
        with pl.using(pair.model, rows=["b", None]):
            return pair.model(x)

    output = step(pair.batch["input"])
    close(output[0], pair.expected["b"][0])
    close(output[1], pair.expected[None][1])


def test_a_graph_break_inside_a_scope_inside_compiled_code(pair: Pair) -> None:
    """Law 11 there too: code that dynamo gives up on runs in pieces."""
    elsewhere: list[str | None] = []

    @torch.compile(backend=Graphs())
    def step(name: str | None, x: Tensor) -> tuple[Tensor, Tensor]:
        with pl.using(pair.model, name):
            before = pair.model(x)
            torch._dynamo.graph_break()
            in_threads(lambda: elsewhere.append(pair.seen()))
            return before, pair.model(x)

    for name in (*CHOICES, *CHOICES):
        before, after = step(name, pair.batch["input"])
        assert (pair.shown(before), pair.shown(after)) == (name, name)
        assert pair.seen() == "a"
    assert elsewhere == ["a"] * 6


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_part_of_a_model() -> None:
    pair = Pair("gpt")
    pair.model.blocks[0].compile(backend=Graphs())
    for standing, scope, in_force in THERE_AND_BACK:
        pl.use(pair.model, standing)
        with enter(pair, scope):
            assert pair.seen() == in_force


@pytest.mark.heavy
def test_inductor_equals_eager(pair: Pair) -> None:
    compiled = torch.compile(pair.model, fullgraph=True)
    for name in CHOICES:
        pl.use(pair.model, name)
        assert pair.seen(compiled) == name


# -- reading weights


def formed(pair: Pair, name: str, layer: int = 0) -> Tensor:
    placed = pl.deltas(pair.model)[name].placed[f"{layer}.weight"]
    return placed.patch.value(placed.site.tensor)


def test_a_weight_read_from_outside_is_the_choice_s(pair: Pair) -> None:
    layer = pair.model[0]
    assert torch.equal(layer.weight.detach(), formed(pair, "a"))
    with pair.using("b"):
        held = layer.weight
        assert torch.equal(held.detach(), formed(pair, "b"))
        with pair.using(None):
            assert layer.weight is layer._parameters["weight"]
    assert torch.equal(held.detach(), formed(pair, "b"))  # what was read stays
    assert torch.equal(layer.weight.detach(), formed(pair, "a"))
    with pl.using(pair.model, ["a", "b"]):
        both = formed(pair, "a") + formed(pair, "b") - layer._parameters["weight"]
        close(layer.weight.detach(), both)


def test_a_model_that_would_make_a_cache_makes_none_under_rows() -> None:
    kind = KIND["hf_llama"]
    model, batch = kind.model(), {"input_ids": kind.batch()["input_ids"]}
    for name in "ab":
        disturb(pl.attach(model, pl.LoRA(rank=2), name=name))
    with pl.using(model, rows=["a", "b"]):
        output = model(**batch)
        rows = model(*batch.values(), None, use_cache=None)
    assert output.past_key_values is None and torch.equal(output.logits, rows.logits)
    for i, name in enumerate("ab"):
        with pl.using(model, name):
            close(output.logits[i], model(**batch).logits[i])


def test_a_weight_read_under_rows_is_refused(pair: Pair) -> None:
    with pl.using(pair.model, rows=["a", None]):
        with pytest.raises(pl.PeftliteError, match="'weight' is read outside of a call"):
            _ = pair.model[0].weight
        pair.run()


@pytest.fixture
def values() -> Iterator[mock.Mock]:
    """Counts the times that a W' is formed."""
    with mock.patch.object(LoRAPatch, "value", autospec=True, side_effect=LoRAPatch.value) as spy:
        yield spy


def test_metadata_never_forms_a_value(pair: Pair, values: mock.Mock) -> None:
    w, own = pair.model[0].weight, pair.model[0]._parameters["weight"]
    for name in ("dtype", "shape", "device", "ndim", "layout", "is_cuda", "is_meta", "nbytes"):
        assert getattr(w, name) == getattr(own, name), name
    for name in ("size", "dim", "numel", "element_size", "is_floating_point", "get_device"):
        assert getattr(w, name)() == getattr(own, name)(), name
    assert len(w) == len(own)
    assert isinstance(w, Tensor)
    assert w.grad is None
    assert values.call_count == 0


def test_t5_reads_its_weight_for_the_dtype_alone(values: mock.Mock) -> None:
    pair = Pair("hf_t5", targets="wo")
    pair.run()
    assert values.call_count == 0


def test_one_read_forms_its_value_once(pair: Pair, values: mock.Mock) -> None:
    w = pair.model[0].weight
    assert torch.equal(w + w, 2 * w)
    assert values.call_count == 1
    with torch.no_grad():
        assert not (w * 1).requires_grad
    assert (w * 1).requires_grad  # what was formed without gradients is no use here


def test_a_read_stands_for_its_value_in_any_operation(pair: Pair) -> None:
    w, value, x = pair.model[0].weight, formed(pair, "a"), torch.randn(3, 10)
    for operation in (
        lambda w: w + 1,
        lambda w: 2 - w,
        lambda w: w[1:, 0],
        lambda w: (w > 0).float(),
        lambda w: torch.stack([w, w]),
        lambda w: torch.cat((w, value)),
        lambda w: w.to(torch.bfloat16),
        lambda w: w.clone(),
        lambda w: sum(row.sum() for row in w),
        lambda w: torch.tensor(w.tolist()),
        lambda w: torch.from_numpy(w.detach().numpy()),
        lambda w: copy.deepcopy(w.detach()),
    ):
        result = operation(w)
        assert type(result) is Tensor
        assert torch.equal(result, operation(value))
    for product in (  # these are made of its parts
        lambda w: F.linear(x, w),
        lambda w: F.linear(x, weight=w, bias=None),
        lambda w: -w @ w.T,
        lambda w: torch.einsum("oi,bi->bo", w, x),
        lambda w: torch.func.grad(lambda x: F.linear(x, w).sum())(x),
        lambda w: torch.vmap(lambda x: F.linear(x, w))(x),
    ):
        result = product(w)
        assert type(result) is Tensor
        torch.testing.assert_close(result, product(value))
    assert not w.detach().requires_grad
    F.linear(x, w).sum().backward()
    assert all(
        p.grad is not None for p in pl.deltas(pair.model)["a"].placed["0.weight"].patch.parameters()
    )


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data,
        lambda w: setattr(w, "data", torch.zeros(16, 10)),
        lambda w: setattr(w, "grad", None),
        lambda w: setattr(w, "requires_grad", False),
        lambda w: w.requires_grad_(False),
        lambda w: w.copy_(torch.zeros(16, 10)),
        lambda w: w.__setitem__(0, 0.0),
        lambda w: w.__iadd__(1),
        lambda w: w.add_(1),
        lambda w: nn.init.zeros_(w),
        lambda w: torch.add(torch.ones(16, 10), 1, out=w),
        lambda w: torch._foreach_mul_([w], 2),
    ],
)
def test_a_write_into_a_read_is_refused(pair: Pair, write: Callable[[Tensor], object]) -> None:
    with pytest.raises(
        pl.PeftliteError, match=r"writ.* into .*; to look at the value, use \.detach"
    ):
        write(pair.model[0].weight)
    assert pair.seen() == "a"


def test_tying_by_assignment_ties_the_parameter() -> None:
    pair = Pair("gpt", targets=["embed", "lm_head"])
    pair.model.lm_head.weight = pair.model.embed.weight
    tied = pair.model.embed._parameters["weight"]
    assert pair.model.lm_head._parameters["weight"] is tied
    with pytest.raises(TypeError, match="cannot assign"):  # loud where torch itself has the say
        pair.model.position.weight = pair.model.embed.weight


# -- activation checkpointing: the second run of a forward sees the choice of the first


def plainly(block: nn.Module, x: Tensor) -> Tensor:
    return block(x).sin()


def once(reentrant: bool) -> Callable:
    return lambda block, x: checkpoint(plainly, block, x, use_reentrant=reentrant)


def twice(outer: bool, inner: bool) -> Callable:
    """One checkpointed call in another, with nothing of the model directly in the outer one."""
    return lambda block, x: checkpoint(
        lambda x: checkpoint(block, x, use_reentrant=inner).sin(), x, use_reentrant=outer
    )


CHECKPOINTING = {
    "non-reentrant": once(False),
    "reentrant": once(True),
    **{f"{o} around {i}": twice(o, i) for o in (False, True) for i in (False, True)},
}


def backward_inside(pair: Pair, scope: AbstractContextManager[None], loss: Callable) -> None:
    with scope:
        loss().backward()


def backward_after(pair: Pair, scope: AbstractContextManager[None], loss: Callable) -> None:
    with scope:
        value = loss()
    value.backward()


def backward_in_another_scope(
    pair: Pair, scope: AbstractContextManager[None], loss: Callable
) -> None:
    with scope:
        value = loss()
    with pair.using("b"):
        value.backward()


def backward_in_a_thread(pair: Pair, scope: AbstractContextManager[None], loss: Callable) -> None:
    """As on a GPU, whose backward passes run in threads of their own."""
    with scope:
        value = loss()
        in_threads(value.backward)


@pytest.mark.parametrize("how", CHECKPOINTING)
def test_checkpointed_calls_choose_again_as_they_did(how: str) -> None:
    pair = Pair("gpt")
    pl.use(pair.model, "b")
    x = torch.randn(3, 4, 16, requires_grad=True)

    def gradients(
        run: Callable, scope: AbstractContextManager[None], backward: Callable
    ) -> list[Tensor | None]:
        def loss() -> Tensor:
            return functools.reduce(lambda x, block: run(block, x), pair.model.blocks, x).sum()

        backward(pair, scope, loss)
        grads = [p.grad for p in (x, *pair.model.parameters())]
        pair.model.zero_grad()
        x.grad = None
        return grads

    scopes: list[Callable[[], AbstractContextManager[None]]] = [
        nullcontext,
        *(lambda name=name: pair.using(name) for name in CHOICES),
        lambda: pl.using(pair.model, rows=["a", None, "b"]),
    ]
    for scope in scopes:
        expected = gradients(plainly, scope(), backward_inside)
        for backward in (
            backward_inside,
            backward_after,
            backward_in_another_scope,
            backward_in_a_thread,
        ):
            again = gradients(CHECKPOINTING[how], scope(), backward)
            for found, grad in zip(again, expected, strict=True):
                if grad is None:
                    assert found is None or not found.any()
                else:
                    close(found, grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_scopes_inside_a_checkpointed_call(reentrant: bool) -> None:
    pair, x = Pair("gpt"), torch.randn(2, 4, 16, requires_grad=True)
    first, second = pair.model.blocks

    def run(x: Tensor) -> Tensor:
        x = first(x)
        with pair.using("b"):
            x = second(x)
        return first(x)

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        with pair.using(None):
            loss = run(x).square().mean()
        with pair.using("a"):
            loss.backward()
        grads = [p.grad for p in (x, *pl.deltas(pair.model)["b"].parameters())]
        assert all(p.grad is None for p in pl.deltas(pair.model)["a"].parameters())
        pair.model.zero_grad()
        x.grad = None
        return grads

    expected = gradients(run)
    found = gradients(lambda x: checkpoint(run, x, use_reentrant=reentrant))
    for grad, other in zip(found, expected, strict=True):
        assert (grad is None) == (other is None)
        if grad is not None:
            close(grad, other)


class Rerun(torch.autograd.Function):
    """Checkpointing of someone else's making."""

    @staticmethod
    def forward(ctx, run: Callable, x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            ctx.run(x).backward(grad)
        return None, x.grad


def test_checkpointing_that_can_not_be_told_of_a_scope_refuses_it() -> None:
    pair, x = Pair("gpt"), torch.randn(2, 4, 16, requires_grad=True)
    block, other = pair.model.blocks
    says = r"choose with pl\.use or pl\.view"
    composable_checkpoint(other)
    for run in (lambda: Rerun.apply(block, x), lambda: other(x)):
        run().sum().backward()
        with pair.using("b"), pytest.raises(pl.PeftliteError, match=says):
            run()
        with torch.inference_mode(), pair.using("b"):
            run()


class Checkpointed(nn.Module):
    """An embedding, a checkpointed part that is read and one that is called, and a head."""

    def __init__(self, run: Callable) -> None:
        super().__init__()
        self.tokens, self.head, self.run = nn.Embedding(8, 4), nn.Linear(4, 2), run
        self.called, self.read = nn.Linear(4, 4), nn.MultiheadAttention(4, 2)

    def part(self, x: Tensor) -> Tensor:
        return self.read(x, x, x, need_weights=False)[0] + self.called(x)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.run(self.part, self.tokens(ids)))


REENTRANT: dict[str, Callable] = {
    "torch's": lambda part, x: checkpoint(part, x, use_reentrant=True),
    "nested": lambda part, x: checkpoint(
        lambda x: checkpoint(part, x, use_reentrant=True), x, use_reentrant=True
    ),
    "another's": Rerun.apply,
}
PARTS = ["called", "read.in_proj_weight", "read.out_proj.weight"]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's own word
@pytest.mark.parametrize("target", PARTS)
@pytest.mark.parametrize("run", REENTRANT.values(), ids=REENTRANT)
def test_checkpointing_that_no_gradient_gets_into_is_refused(run: Callable, target: str) -> None:
    model, ids = Checkpointed(run), torch.arange(6)
    delta = pl.attach(model, pl.LoRA(rank=1, targets=[target, "head"]))
    with pytest.raises(pl.PeftliteError, match="use_reentrant=False"):
        model(ids)
    for disabled in (torch.no_grad, torch.inference_mode):
        with disabled():
            model(ids)
    delta.requires_grad_(False)
    model(ids)
    delta.requires_grad_()
    model.tokens.register_forward_hook(lambda _, __, x: x.requires_grad_())
    model(ids).sum().backward()
    assert all(p.grad is not None for p in delta.parameters())
