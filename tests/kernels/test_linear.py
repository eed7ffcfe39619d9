"""lora_linear in torch: the reference's values and gradients, under everything torch does to it."""

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import peftlite as pl
from peftlite import kernels
from peftlite.kernels import dispatch, lora_linear, reference, torch_ops, workspace
from peftlite.kernels.native import low_rank
from tests.kernels.against import NAMES, assert_close, factors, run, truth


@pytest.fixture(autouse=True, scope="module")
def at_any_size() -> Iterator[None]:
    with kernels.backend("torch"):
        yield


SEED = torch.tensor(0x1234_5678_9ABC_DEF)
sizes = st.integers(1, 40)


@given(
    shape=st.sampled_from([(), (1,), (7,), (0,), (2, 3), (2, 1, 3)]),
    i=sizes,
    o=sizes,
    rank=st.integers(1, 256),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.5, 2.7]),
    dropout=st.sampled_from([0.0, 0.4]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    wide=st.sampled_from([None, torch.float32, torch.float64]),
    wanted=st.sets(st.sampled_from(NAMES)).map(lambda names: {"a", *names}),
)
def test_is_the_reference(shape, i, o, rank, bias, scale, dropout, dtype, wide, wanted) -> None:
    tensors = factors(*shape, i=i, o=o, rank=rank, bias=bias)
    options = {"scale": scale, "dropout": dropout, "seed": SEED}
    found = run(lora_linear, tensors, dtype, wanted, wide, **options)
    assert_close(found, truth(tensors, wanted, **options))


@given(tokens=sizes, i=sizes, dropout=st.floats(0.01, 0.99), seed=st.integers(0, 2**62))
def test_masks_are_the_reference_s(tokens: int, i: int, dropout: float, seed: int) -> None:
    x, seed = torch.ones(tokens, i), torch.tensor(seed)
    found = torch_ops.expand(x[:, :1], torch.ones(1, i), None, dropout, seed, x.dtype)
    assert torch.equal(found.bool(), reference.keep(seed, tokens, i, dropout))


@pytest.mark.parametrize("native", [False, True])
def test_a_mask_made_in_parts_is_one_mask(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_ops, "_ENTRIES", 50)
    for limit in ("_ALONE", "_CACHED"):
        monkeypatch.setattr(torch_ops, limit, 25)
    if not native:
        monkeypatch.setattr(torch_ops.mask, "drops", lambda _: False)
    parts = torch_ops._parts(torch.ones(33, 21), torch.float32, 0.3, SEED)
    found = [part.clone() for _, part in parts]
    assert len(found) > 2 and sum(map(len, found)) == 33
    found = torch.cat(found)
    assert torch.equal(found.bool(), reference.keep(SEED, 33, 21, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [3, 16])
def test_in_blocks_and_pieces(
    dtype: torch.dtype, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch_ops, "_ENTRIES", 200)
    monkeypatch.setattr(torch_ops, "_PIECE", 8)
    tensors = factors(33, i=24, o=32, rank=rank)
    assert_close(run(lora_linear, tensors, dtype, factors=torch.float32), truth(tensors))


def test_room_that_is_kept_is_of_use_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_kept", threading.local())
    tensors = factors(64, i=48, o=40, rank=4)

    def call(*_: object) -> dict[str, Tensor | None]:
        return run(lora_linear, tensors, torch.bfloat16, factors=torch.float32)

    def shrink() -> Tensor:
        return torch_ops.shrink(torch.ones(64, 48).bfloat16(), torch.ones(16, 48), 1.0, 0.0, None)

    with FakeTensorMode():
        assert isinstance(shrink(), FakeTensor)
    assert not vars(workspace._kept)
    with torch.inference_mode():
        shrink()
    assert not any(tensor.is_inference() for tensor, *_ in vars(workspace._kept).values())
    with FakeTensorMode():
        assert isinstance(shrink(), FakeTensor)
    alone = call()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(call, range(32)):
            assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_masks_look_like_chance() -> None:
    keep = reference.keep(SEED, 512, 512, 0.25).double()
    other = reference.keep(SEED + 1, 512, 512, 0.25).double()
    sigma = (0.25 * 0.75) ** 0.5
    assert abs(keep.mean() - 0.75) < 4 * sigma / 512
    for mask in (keep, keep.t()):
        assert 0.85 < mask.mean(0).std() / (sigma / 512**0.5) < 1.15
        correlations = torch.corrcoef(mask).fill_diagonal_(0)
        assert correlations.abs().max() < 6 / 512**0.5
    assert abs(torch.corrcoef(torch.stack([keep.flatten(), other.flatten()]))[0, 1]) < 4 / 512


def test_inputs_in_any_layout() -> None:
    tensors = factors(4, 6, i=8, o=5, rank=3)
    strided = {name: t.mT.contiguous().mT if t.dim() > 1 else t for name, t in tensors.items()}
    assert_close(run(lora_linear, strided, torch.float64), truth(tensors))
    expanded = tensors | {"x": tensors["x"][:1].expand(4, 6, 8)}
    assert_close(run(lora_linear, expanded, torch.float64), truth(expanded))


def test_one_tensor_may_come_in_twice() -> None:
    def square(call) -> Tensor:
        x, a = (t.requires_grad_() for t in (x0.clone(), a0.clone()))
        return torch.autograd.grad(call(x, a.detach(), None, a, a).square().sum(), [x, a])

    x0, a0 = torch.randn(3, 4, 4).double().unbind(0)[0], torch.randn(4, 4).double()
    for found, true in zip(square(lora_linear), square(reference.lora_linear), strict=True):
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_is_differentiable_twice(dropout: float) -> None:
    tensors = [t.requires_grad_() for t in factors(3, i=4, o=3, rank=2).values()]

    def call(*tensors: Tensor) -> Tensor:
        return lora_linear(*tensors, 0.5, dropout, SEED)

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


FIFTY = factors(50, i=30, o=40, rank=4)


def saved(call: Callable[[], Tensor]) -> dict[int, int]:
    """The bytes of every storage that is kept for the backward pass, by its address."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return kept


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
def test_keeps_its_input_and_r_numbers_a_token(dropout: float, wide: torch.dtype) -> None:
    def leaf(name: str, tensor: Tensor) -> Tensor:
        return tensor.to(wide if name in "ab" else torch.bfloat16).requires_grad_()

    tensors = {name: leaf(name, tensor) for name, tensor in FIFTY.items()}
    own = {t.untyped_storage().data_ptr() for t in tensors.values()}
    kept = saved(lambda: lora_linear(*tensors.values(), 1.0, dropout, SEED))
    beyond = sum(count for storage, count in kept.items() if storage not in own)
    assert beyond == 50 * 4 * wide.itemsize + SEED.nbytes * (dropout > 0)


def test_a_frozen_a_keeps_no_input() -> None:
    tensors = {name: t.requires_grad_(name in "xb") for name, t in FIFTY.items()}
    storages = saved(lambda: lora_linear(*tensors.values()))
    assert tensors["x"].data_ptr() not in storages


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_makes_the_same_mask_again(dropout: float, reentrant: bool) -> None:
    def gradients(call) -> list[Tensor]:
        torch.manual_seed(0)
        x, w, bias, a, b = (t.requires_grad_() for t in factors(9, i=6, o=5, rank=2).values())
        call(lambda x: lora_linear(x, w, bias, a, b, 1.0, dropout), x).square().sum().backward()
        return [t.grad for t in (x, w, bias, a, b)]

    def checkpointed(f, x: Tensor) -> Tensor:
        return checkpoint(f, x, use_reentrant=reentrant)

    plain, again = gradients(lambda f, x: f(x)), gradients(checkpointed)
    assert all(map(torch.equal, plain, again))


def test_is_deterministic() -> None:
    tensors = factors(64, i=96, o=80, rank=16)
    runs = [run(lora_linear, tensors, torch.bfloat16, dropout=0.1, seed=SEED) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_the_base_s(dtype: torch.dtype) -> None:
    tensors = factors(7, i=16, o=12, rank=4)

    def call(*leaves: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            y = lora_linear(*leaves)
        assert y.dtype is dtype
        return y

    found = run(call, tensors, torch.float32)
    assert all(found[name].dtype is torch.float32 for name in NAMES)
    true = truth(tensors)
    assert_close({name: t.to(dtype) for name, t in found.items()}, true)


@pytest.mark.heavy
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_compiles_whole(dropout: float, shape: tuple[int, ...]) -> None:
    torch.compiler.reset()
    tensors = factors(*shape, i=8, o=5, rank=2)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    options = {"scale": 0.5, "dropout": dropout, "seed": SEED}
    assert_close(run(compiled, tensors, torch.float64, **options), truth(tensors, **options))


def test_exports() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return lora_linear(x, *rest)

    x, *rest = factors(3, i=4, o=5, rank=2).values()
    exported = torch.export.export(Layer(), (x,)).module()
    torch.testing.assert_close(exported(x), reference.lora_linear(x, *rest))


# torch's own, as it first differentiates forward
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transforms_take_the_reference() -> None:
    x, w, bias, a, b = factors(6, i=4, o=5, rank=2).values()
    y = reference.lora_linear(x, w, bias, a, b)

    def loss(a: Tensor, x: Tensor) -> Tensor:
        return lora_linear(x, w, bias, a, b).square().sum()

    mapped = torch.func.vmap(lora_linear, in_dims=(0, *[None] * 4))(x, w, bias, a, b)
    torch.testing.assert_close(mapped, y)
    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(a, x)
    torch.testing.assert_close(rows.sum(0), torch.func.grad(loss)(a, x))
    _, tangent = torch.func.jvp(lambda a: lora_linear(x, w, bias, a, b), (a,), (a,))
    torch.testing.assert_close(tangent, y - x @ w.t() - bias)
    with forward_ad.dual_level():
        dual = lora_linear(x, w, bias, forward_ad.make_dual(a, a), b)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent)


class TestBackend:
    @pytest.fixture(autouse=True)
    def none_forced(self) -> Iterator[None]:
        with kernels.backend(None):
            yield

    def test_is_forced_and_left(self) -> None:
        x = torch.ones(200, 300)
        assert not dispatch.by_autograd(x)
        with kernels.backend("reference"):
            assert dispatch.by_autograd(x)
        assert not dispatch.by_autograd(x)
        kernels.backend("reference")
        assert dispatch.by_autograd(x)
        kernels.backend(None)
        assert not dispatch.by_autograd(x)

    def test_refuses_what_there_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(pl.PeftliteError, match="no backend 'cuda': there are reference, torch"):
            kernels.backend("cuda")
        monkeypatch.setattr(dispatch, "_HAS_TRITON", False)
        with pytest.raises(pl.PeftliteError, match="pip install triton"):
            kernels.backend("triton")

    def test_few_numbers_take_the_reference(self) -> None:
        assert dispatch.is_plain(torch.ones(8, 8), 0.1)
        assert not dispatch.is_plain(torch.ones(200, 300), 0.0)
        with kernels.backend("torch"):
            assert not dispatch.is_plain(torch.ones(8, 8), 0.1)

    def test_factors_wider_than_fp32_have_no_kernels(self, monkeypatch) -> None:
        monkeypatch.setattr(dispatch, "_INTERPRETED", True)
        monkeypatch.setattr(dispatch, "_HAS_TRITON", True)
        x = torch.ones(200, 300, dtype=torch.bfloat16)
        with kernels.backend("triton"):
            assert dispatch.path_with(x, torch.float32) == "triton"
            assert dispatch.path_with(x, torch.float64) == "torch"
            assert dispatch.path_with(x.float(), torch.float32) == "torch"

    def test_report_says_why(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        pl.attach(model, pl.LoRA(rank=2, targets="0"))
        lines = kernels.report(model).splitlines()
        assert lines[0].split() == ["module", "device", "dtype", "path", "because"]
        path = "native" if low_rank.SINGLE.ready() else "torch"
        assert lines[2].split()[:4] == ["0", "cpu", "float32", path]
        with kernels.backend("reference"):
            assert "backend('reference') was called" in kernels.report(copy.deepcopy(model))
