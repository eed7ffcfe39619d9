"""The contract: every method × every kind of model × every law.

A new method joins with its card and inherits every law on every kind. A cell that can't hold names
the error that it raises instead.
"""

import copy
import io
import pickle
import random
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from _pytest.mark import ParameterSet
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import peftlite as pl
from peftlite.core import host
from tests.cards import ROWS, WAY, WAYS
from tests.cards.card import Row
from tests.cells import (
    CELLS,
    DEAR,
    REFUSALS,
    Graphs,
    add,
    attached,
    close,
    disturb,
    first_block,
    in_threads,
    packed_again,
    unmergeable,
)
from tests.digest import assert_same, bits, digest
from tests.zoo import Kind, seeded

# torch itself refuses to pickle a parametrized module
UNPICKLABLE = {"weight_norm": "only supported through state_dict"}

# what nothing that requires a gradient goes into, torch computes in one: the last bits move
FUSED_BY_TORCH = ("mha_encoder", "mha_decoder")

cells = pytest.mark.parametrize("row, kind", CELLS)


# the kinds of several blocks that are alike, but gpt
ALIKE = ("gpt_fused", "gpt_tied", "mha_encoder")

# what the code of a real model meets: a read, a call of a map, or its own call. How a patch makes
# the call of a map (by turned inputs, by entries, with shared parameters) it can't see
MET = ("value", "map", "module", "states", "tokens")


def compiled_on(row: Row) -> list[Kind]:
    """The kinds that a row is compiled on in the plain run; the others are left to the slow one.

    What a compiler trips over is the way a method changes a model, as it meets a kind of module: so
    each way is compiled on every kind, by one row. What is a row's alone is the arithmetic of its
    patch, which is the same wherever it stands: it is compiled on two kinds, drawn by its name.
    """
    kinds = [cell.values[1] for cell in CELLS if cell.values[0] is row and not cell.marks]
    cheap = [kind for kind in kinds if kind.name not in DEAR]
    if row.name in WAYS.values():
        return kinds if WAY[row.name] in MET else cheap
    cheap = [kind for kind in cheap if kind.uncompilable is None]
    return random.Random(row.name).sample(cheap, min(2, len(cheap)))


SHOWN = {(row, kind) for row in ROWS for kind in compiled_on(row)}


def compiled_cells() -> Iterator[ParameterSet]:
    """The cells, with a block where a compiler would trace several alike, as all ways do on gpt."""
    for cell in CELLS:
        row, kind = cell.values
        shown = (row, kind) in SHOWN
        if shown and kind.name in ALIKE:
            yield pytest.param(row, first_block(kind), id=f"{cell.id}-block")
            shown = False
        marks = [pytest.mark.heavy] * (kind.name in DEAR) if shown else [pytest.mark.slow]
        yield pytest.param(row, kind, id=cell.id, marks=marks)


@pytest.mark.parametrize("row, kind", REFUSALS)
def test_refusal(row: Row, kind: Kind) -> None:
    model = kind.model()
    before = digest(model)
    with pytest.raises(pl.TargetError, match=row.refused[kind.name]):
        pl.attach(model, row.method)
    assert_same(before, digest(model))


@cells
def test_law_1_a_fresh_delta_changes_no_output(row: Row, kind: Kind) -> None:
    # torch picks kernels by what requires a gradient: freezing a T5 alone moves the last bits, and
    # so does its bias of positions, where attention is torch's own
    model, batch = kind.model().requires_grad_(False), kind.batch()
    run = sdpa_kernel(SDPBackend.MATH)(kind.run) if kind.name == "hf_t5" else kind.run
    before = run(model, batch)
    pl.attach(model, row.method)
    if row.fresh:
        # a recurrent layer's product is another one where its weight is to learn
        near = kind.name in (*FUSED_BY_TORCH, "gru", "lstm")
        close(run(model, batch), before, 1e-6 if near else 0.0)
        with torch.no_grad():
            close(run(model, batch), before, 1e-6 if kind.name in FUSED_BY_TORCH else 0.0)
    else:
        assert not torch.allclose(run(model, batch), before)


@cells
def test_law_2_only_the_delta_learns(row: Row, kind: Kind) -> None:
    model, batch = kind.model(), kind.batch()
    base = {name: bits(p) for name, p in model.named_parameters()}
    kept = {name: bits(b) for name, b in model.named_buffers()}
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
    buffers = dict(model.named_buffers())
    assert all(bits(buffers[name]) == was for name, was in kept.items())
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
    merged = kind.run(packed_again(row, kind), batch) if kind.packed else output
    pl.merge(model, "a")
    close(kind.run(model, batch), merged, 1e-6)
    with torch.no_grad():  # torch's fused paths read the weights themselves
        close(kind.run(model, batch), merged, 1e-6)
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


@pytest.mark.parametrize("row, kind", [*compiled_cells()])
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
    if not row.shaped:
        with pytest.raises(pl.PeftliteError, match="rows= can't put back an output"):
            with pl.using(model, rows=rows):
                kind.run(model, batch)
        rows = ["a", ["a", "b"], "b", "a", ["a", "b"]]
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
            for _ in range(3):
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
