"""Native kernels: the same bits as plain torch, or plain torch and the reason; never a crash."""

import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

import peftlite as pl
from peftlite import kernels
from peftlite.bank.rows import Rows
from peftlite.kernels import lora_linear, reference
from peftlite.kernels.experts import Product, experts_linear
from peftlite.kernels.native import build, features, low_rank, mask, packed
from peftlite.kernels.native.kernel import Kernel
from peftlite.kernels.native.kernels import KERNELS
from peftlite.kernels.rows import mixed_low_rank
from peftlite.quant import nf4, packing, rows
from tests.kernels.against import assert_close, factors, run, truth

SPANS = [(0, slice(0, 70)), (1, slice(70, 71)), (3, slice(71, 140))]
SEED = torch.tensor(0x1234_5678_9ABC_DEF)
VENDOR, FLAGS = features.vendor_and_flags()
ASKED = os.environ.get("PEFTLITE_NATIVE", "1")
OFF = ASKED == "0" or shutil.which("cc") is None
each = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


def runs(kernel: Kernel) -> bool:
    """Whether it is to run here, which it does then."""
    wanted = VENDOR in kernel.ran or kernel.name in ASKED.split(",")
    assert kernel.ready() == (FLAGS.issuperset(kernel.needs) and wanted and not OFF), kernel.why
    return kernel.ready()


@pytest.fixture(autouse=True, scope="module")
def settled() -> None:
    """What runs here is settled before a test changes the environment."""
    for kernel in KERNELS:
        kernel.ready()


@pytest.fixture(autouse=True)
def all_sizes(monkeypatch) -> None:
    """Few rows in fp32, too, which plain torch would take."""
    monkeypatch.setattr(low_rank, "_CACHED", 0)


def fresh(kernel: Kernel) -> Kernel:
    return replace(kernel, lib=None, why="", _settled=False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    """An empty cache, and a CPU that every kernel is for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PEFTLITE_NATIVE", "1")
    flags = frozenset(flag for kernel in KERNELS for flag in kernel.needs)
    monkeypatch.setattr(features, "vendor_and_flags", lambda: ("GenuineIntel", flags))
    return tmp_path / "peftlite" / "native"


def compiler(path: Path, script: str, monkeypatch) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))


# -- what they compute


@pytest.mark.parametrize("kind", packed.KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_become_the_very_same_bits(kind: str, dtype: torch.dtype) -> None:
    bits = torch.int16 if dtype is torch.bfloat16 else torch.int32
    shapes = (4, 128), (37, 191), (3, 5), (1, 1), (6, 3, 40), (128, 512)
    of_nf4 = [(True, 64), (False, 32), (True, 4096)] if kind == "nf4" else [(False, 0)]
    for shape, (double, block), size in product(shapes, of_nf4, (1, 1e-38)):
        how, parts = packing.pack(torch.randn(shape) * size, kind, block, double)
        true, found = torch.empty(shape, dtype=dtype), torch.full(shape, 7, dtype=dtype)
        _ = nf4.unpack(parts, block, true) if kind == "nf4" else rows.unpack(parts, true)
        assert packed.unpack(how._codes(parts), found) == runs(packed.KERNEL)
        if packed.KERNEL.ready():
            assert torch.equal(found.view(bits), true.view(bits)), (shape, double, block, size)


@pytest.mark.parametrize("kind", packed.KINDS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 16, 70])
def test_rows_are_multiplied_with_the_codes(kind: str, tokens: int) -> None:
    for dtype, (o, i), bias, block in product(
        (torch.bfloat16, torch.float32), ((9, 256), (128, 384)), (0, 1), (64, 128)
    ):
        how, parts = packing.pack(torch.randn(o, i), kind, block)
        x, b = torch.randn(1, tokens, i).to(dtype), torch.randn(o).to(dtype) if bias else None
        y = how.cast(dtype).product(x, parts, b)
        tiled = dtype is torch.bfloat16 and tokens >= packed.TILED[0] and runs(packed.TILES)
        assert (y is not None) == (tiled or (tokens <= packed.FEW and runs(packed.KERNEL)))
        if y is not None:
            w = how.cast(torch.float32).unpack(parts).double()
            true = torch.nn.functional.linear(x.double(), w, b if b is None else b.double())
            assert y.dtype is dtype and y.shape == (1, tokens, o)
            assert (y - true).norm() < (3e-3 if dtype is torch.bfloat16 else 1e-6) * true.norm()


@pytest.mark.parametrize("kind", packed.KINDS)
@pytest.mark.parametrize("tokens", [1, 16, 70])
def test_and_their_gradients(kind: str, tokens: int) -> None:
    for (o, i), block in product(((32, 128), (160, 1152)), (64, 128)):
        how, parts = packing.pack(torch.randn(o, i), kind, block)
        dy = torch.randn(1, tokens, o).bfloat16()
        dx = how.cast(torch.bfloat16).back(dy, parts)
        assert (dx is not None) == runs(packed.TILES)
        if dx is not None:
            true = dy.double() @ how.cast(torch.bfloat16).unpack(parts).double()
            assert dx.dtype is torch.bfloat16 and dx.shape == (1, tokens, i)
            assert (dx - true).norm() < 1.01 * (true.bfloat16() - true).norm()  # rounded once


@pytest.mark.parametrize(
    ("i", "block", "dtype"),
    [
        (120, 64, torch.float32),
        (256, 32, torch.float32),
        (64, 64, torch.half),
        (2 * packed.WIDEST, 64, torch.float32),
    ],
)
def test_what_does_not_fit_goes_by_plain_torch(i: int, block: int, dtype: torch.dtype) -> None:
    model = torch.nn.Linear(i, 8, dtype=dtype)
    x = torch.randn(2, i, dtype=dtype)
    pl.quantize(model, "nf4", targets="*", block=block)
    w = model.weight
    assert w.packing.product(x, w.parts, None) is None
    assert w.packing.back(model(x), w.parts) is None
    assert torch.allclose(model(x), torch.nn.functional.linear(x, w.form(), model.bias))


@pytest.mark.heavy
def test_in_a_child_process_and_on_two_threads(cache: Path) -> None:
    code = """
import os, torch
import peftlite as pl
from pathlib import Path
from peftlite.kernels.native import low_rank, packed
from peftlite.quant import packing
cache = Path(os.environ["XDG_CACHE_HOME"])
assert not any(cache.iterdir()), "built on import"
how, parts = packing.pack(torch.randn(512, 512), "nf4")
torch.set_num_threads(2)
two = how.unpack(parts)
made = packed.KERNEL.ready()
x, a, b = torch.randn(999, 512).bfloat16(), torch.randn(8, 512), torch.randn(512, 8)
def products():
    h = low_rank.shrink(x, a, 1.0, 0.0, None)
    return *low_rank.grad_ab(x, h, b, 1.0, 0.0), low_rank.add(x.clone(), h, b.t(), 0.0, None)
of_two, tiles = products(), low_rank.runs(torch.bfloat16)
half, dy = how.cast(torch.bfloat16), x[:70]
def packed_products():
    return half.product(dy, parts, None), half.back(dy, parts)
packed_two, formed_tiles = packed_products(), packed.TILES.ready()
assert len([*cache.rglob("*.so")]) == made + tiles + formed_tiles
torch.set_num_threads(1)
assert torch.equal(how.unpack(parts), two)
assert not tiles or all(map(torch.equal, products(), of_two))
assert not formed_tiles or all(map(torch.equal, packed_products(), packed_two))
torch.set_num_threads(2)
out, codes = torch.empty(512, 512), how._codes(parts)
child = os.fork()
if not child:  # where torch's own threads hang
    same = packed.unpack(codes, out) and out.numpy().tobytes() == two.numpy().tobytes()
    h = low_rank.shrink(x, a, 1.0, 0.0, None) if tiles else None
    os._exit(same != made)
assert os.waitpid(child, 0)[1] == 0
"""
    cache.parents[1].mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def low_rank_runs() -> bool:
    return any([runs(kernel) for kernel in low_rank.KERNELS[torch.bfloat16]])


OF_Y = {torch.bfloat16: 4e-3, torch.float32: 1e-6}
BESIDE = [(dtype, kernel) for dtype, kernels in low_rank.KERNELS.items() for kernel in kernels]
beside = pytest.mark.parametrize(
    ("dtype", "kernel"), BESIDE, ids=[kernel.name for _, kernel in BESIDE]
)


@beside
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("tokens", "i", "o", "rank"),
    [(1, 32, 32, 1), (70, 96, 160, 5), (300, 64, 1024, 16), (33, 64, 32, 40), (64, 128, 64, 64)],
)
def test_products_beside_a_map(
    tokens: int,
    i: int,
    o: int,
    rank: int,
    dropout: float,
    dtype: torch.dtype,
    kernel: Kernel,
    monkeypatch,
) -> None:
    if not runs(kernel):
        return
    monkeypatch.setitem(low_rank.KERNELS, dtype, (kernel,))
    tensors = factors(tokens, i=i, o=o, rank=rank)
    options = {"scale": 1.5, "dropout": dropout, "seed": SEED}
    with kernels.backend("native"):
        found = run(lora_linear, tensors, dtype, factors=torch.float32, **options)
    true = truth(tensors, **options)
    for name, bound in (("y", OF_Y[dtype]), ("x", OF_Y[dtype]), ("a", 1e-6), ("b", 1e-6)):
        assert (found[name] - true[name]).norm() <= bound * true[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 16, 70])
def test_masks_are_the_reference_s(tokens: int, dtype: torch.dtype) -> None:
    h, up = torch.ones(tokens, 1), torch.ones(1, 96)
    y = low_rank.expand(h, up, None, 0.3, SEED, dtype)
    assert torch.equal(y.bool(), reference.keep(SEED, tokens, 96, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_are_put_where_the_mask_has_them(dtype: torch.dtype) -> None:
    x = torch.ones(70, 1101, dtype=dtype)
    assert mask.drops(x) == runs(mask.KERNEL)
    if mask.drops(x):
        true = reference.keep(SEED, 73, 1101, 0.3)[3:]
        assert torch.equal(mask.drop(x, x, 3, 0.3, int(SEED.item())), true.to(dtype))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["spans", "entries", "listed"])
@beside
def test_every_expert_of_a_product_in_one_call(
    kernel: Kernel, dtype: torch.dtype, kind: str, threads: int, monkeypatch
) -> None:
    if not runs(kernel):
        return
    monkeypatch.setitem(low_rank.KERNELS, dtype, (kernel,))
    e, i, o, r = 5, 96, 64, 20
    w, left, right = (torch.randn(e, *shape) / 9 for shape in ((i, o), (r, i), (o, r)))
    w, ids = w.to(dtype), torch.tensor([0, 3, 0, 1, 3, 3, 1])  # and nothing for 2 and 4
    ends = torch.tensor([70, 71, 71, 140, 140]).int()
    product, tokens = {
        "spans": (
            Product(partial(torch.nn.functional.grouped_mm, offs=ends), lambda: SPANS),
            (140,),
        ),
        "entries": (Product(torch.bmm, lambda: [(k, k) for k in range(e)]), (e, 33)),
        "listed": (
            Product(torch.bmm, lambda: [(k, (ids == k).nonzero()[:, 0]) for k in (0, 1, 3)], ids),
            (len(ids), 3),
        ),
    }[kind]
    x, dy = torch.randn(*tokens, i).to(dtype), torch.randn(*tokens, o).to(dtype)
    monkeypatch.setattr(low_rank, "shrink", None)  # which would take one after another
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    given = [t.requires_grad_() for t in (x, left, right)]
    with kernels.backend("native"):  # so few numbers would go by plain torch
        y = experts_linear(product, x, w[ids] if kind == "listed" else w, left.mT, right.mT, 1.5)
        found = [y, *torch.autograd.grad(y, given, dy)]
    torch.set_num_threads(before)
    exact = [t.detach().double().requires_grad_() for t in given]
    formed = w.double() + 1.5 * (exact[1].mT @ exact[2].mT)
    parts = [exact[0][own] @ formed[k] for k, own in product.groups()]
    dys = [dy.double()[own] for _, own in product.groups()]
    true = torch.autograd.grad(parts, exact, dys)
    for (_, own), part in zip(product.groups(), parts, strict=True):
        assert (y[own] - part).norm() < OF_Y[dtype] * part.norm()
    for ours, theirs, bound in zip(found[1:], true, (OF_Y[dtype], 1e-6, 1e-6), strict=True):
        assert (ours - theirs).norm() < bound * theirs.norm()


@pytest.mark.parametrize("bias", [True, False])
def test_a_delta_of_nothing_moves_no_bit(bias: bool) -> None:
    """Of y and of dx, whichever of the two products is written first."""
    layer = torch.nn.Linear(1024, 96, bias, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(70, 1024).bfloat16().requires_grad_()
    a, b = torch.randn(5, 1024), torch.zeros(96, 5).requires_grad_()
    found, true = lora_linear(x, layer.weight, layer.bias, a, b), layer(x)
    dy = torch.randn_like(true)
    assert torch.equal(found, true)
    (dx, db), (true_dx,) = (
        torch.autograd.grad(y, of, dy) for y, of in ((found, (x, b)), (true, x))
    )
    assert torch.equal(dx, true_dx)
    assert db.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_of_tensors_that_lie_otherwise(dtype: torch.dtype) -> None:
    """A row's end that isn't read, an address between two numbers, factors that are views."""
    x = torch.randn(71 * 80 + 1).to(dtype)[1:].view(71, 80)[:, 5:69]
    a, h = torch.randn(64, 5).t(), torch.randn(71, 7)[:, 1:6]
    dh, db = low_rank.grad_ab(x, h, a.t(), 1.0, 0.0)
    torch.testing.assert_close(dh, x.float() @ a.t())
    torch.testing.assert_close(db, x.float().t() @ h)
    for dropout in (0.0, 0.3):
        y = low_rank.add(x.clone(), h, a, dropout, SEED)
        change = (h @ a) * reference.keep(SEED, 71, 64, dropout)
        torch.testing.assert_close(y, (x.float() + change).to(dtype), rtol=0.02, atol=1e-3)
        before = torch.zeros(71, 80, dtype=dtype)
        low_rank.add(before[:, 5:69], h, a, dropout, SEED)
        assert not before[:, :5].any() and not before[:, 69:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("t", "most"), [(1, 16), (9, 5), (32, 16), (40, 24)])
def test_each_row_with_factors_of_its_own(t: int, most: int, dtype: torch.dtype) -> None:
    i, o, ranks = 96, 160, torch.tensor([0, 3, most, 1], dtype=torch.int32)
    arena = torch.randn(4, most * (i + o) + 2)
    a = arena[:, : most * i].view(4, most, i)
    b = arena[:, most * i : -2].view(4, most, o).mT
    for k, rank in enumerate(ranks):
        a[k, rank:], b[k, :, rank:] = 0, 0
    rows = Rows.of([2, 0, 3, 2, 2, 0])
    x, y = torch.randn(6, t, i).to(dtype), torch.randn(6, t, o).to(dtype)
    true = y.double()
    tables = a, b, arena[:, -1]
    reference.rows_low_rank(true, x.double(), *(t.double() for t in tables), ranks, rows.slots)
    found = mixed_low_rank(y, x, *tables, ranks, lambda: rows.known)
    assert (found is y) == runs(low_rank.ROWS[dtype])
    if found is not None:
        assert (found - true).norm() < OF_Y[dtype] * true.norm()
    narrow = [table.bfloat16() for table in (y, x, a, b)]
    assert mixed_low_rank(*narrow, tables[2], ranks, lambda: rows.known) is None


@pytest.mark.parametrize(
    ("shape", "o", "rank", "wide"),
    [
        ((40, 33), 64, 4, torch.float32),
        ((40, 64), 65, 4, torch.float32),
        ((40, 64), 64, 65, torch.float32),
        ((0, 64), 64, 4, torch.float32),
        ((40, 64), 64, 4, torch.float64),
    ],
)
def test_what_does_not_fit_is_plain_torch_s(shape, o: int, rank: int, wide: torch.dtype) -> None:
    tensors = factors(*shape[:1], i=shape[1], o=o, rank=rank)
    found = []
    for path in ("torch", "native" if low_rank_runs() else "torch"):
        with kernels.backend(path):
            found.append(run(lora_linear, tensors, torch.bfloat16, factors=wide, dropout=0.0))
    assert_close(*found)


# -- how they come to be


@pytest.mark.heavy
@each
def test_compiles_wherever_there_is_a_compiler_for_it(kernel: Kernel, cache: Path) -> None:
    if features.platform.machine() == "x86_64" and shutil.which("cc"):
        path = build.library(kernel.name, kernel.flags)
        assert build.library(kernel.name, kernel.flags) == path and path.parent == cache


@each
@pytest.mark.parametrize(
    ("flags", "native_is", "why"),
    [
        ("all", "0", "PEFTLITE_NATIVE is 0"),
        ("none", "1", "this CPU has no "),
        ("all", "1", "it hasn't been tried on a CPU of Another: PEFTLITE_NATIVE="),
    ],
)
def test_says_why_it_is_off(
    kernel: Kernel, flags: str, native_is: str, why: str, monkeypatch
) -> None:
    there = frozenset(kernel.needs if flags == "all" else ())
    monkeypatch.setattr(features, "vendor_and_flags", lambda: ("Another", there))
    monkeypatch.setenv("PEFTLITE_NATIVE", native_is)
    off = fresh(kernel)
    assert not off.ready() and off.why.startswith(why)


def test_no_compiler(cache: Path, monkeypatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    off = fresh(packed.KERNEL)
    assert not off.ready() and off.why == "there is no C compiler 'no-such-compiler'"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo 'x.c:1: error: no' >&2; exit 1", "failed: x.c:1: error: no"),
        ("sleep 60 & sleep 60", "took more than 0.2 s"),
        ("exit 0", "can't be written: No such file or directory"),
    ],
)
def test_a_compiler_that_fails(
    script: str, why: str, cache: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(build, "SECONDS", 0.2)
    compiler(tmp_path / "compiler", script, monkeypatch)
    off = fresh(packed.KERNEL)
    assert not off.ready() and off.why.endswith(why)
    assert not any(cache.iterdir())


def test_a_cache_that_others_can_write_to(cache: Path, tmp_path: Path, monkeypatch) -> None:
    cache.mkdir(parents=True)
    for place in (cache, tmp_path):
        place.chmod(0o777)
        off = fresh(packed.KERNEL)
        assert not off.ready() and off.why.endswith(f"isn't safe: others can write to {place}")
        place.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    library = cache / "found.so"
    library.touch(mode=0o700)
    with pytest.raises(build.Unavailable, match="isn't this user's alone"):
        build._own(library)


def test_a_cache_that_cannot_be(cache: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "peftlite").touch()
    off = fresh(packed.KERNEL)
    assert not off.ready() and off.why.endswith("can't be made: Not a directory")


@pytest.mark.heavy
@pytest.mark.skipif(not shutil.which("cc"), reason="nothing is built without a compiler")
def test_what_is_no_library_or_is_another_one(cache: Path, tmp_path: Path, monkeypatch) -> None:
    compiler(
        tmp_path / "compiler", 'while [ "$1" != -o ]; do shift; done; echo > "$2"', monkeypatch
    )
    off = fresh(packed.KERNEL)
    assert not off.ready() and off.why.startswith("it can't be loaded")
    if runs(packed.KERNEL):
        off = replace(fresh(packed.KERNEL), agrees=lambda _: False)
        monkeypatch.delenv("CC")
        assert not off.ready() and off.why == "what it computes differs from plain torch"


@pytest.mark.heavy
def test_two_build_the_same_one(cache: Path) -> None:
    if not runs(packed.KERNEL):
        return
    both = [fresh(packed.KERNEL) for _ in range(2)]
    at_once = [threading.Thread(target=kernel.ready) for kernel in both]
    for thread in at_once:
        thread.start()
    for thread in at_once:
        thread.join()
    assert all(kernel.ready() for kernel in both) and len([*cache.iterdir()]) == 1
