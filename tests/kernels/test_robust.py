"""lora_linear as one graph, captured, and with a W that is quantised, sharded or turned."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import peftlite as pl
from peftlite import kernels
from peftlite.kernels import lora_linear, reference
from peftlite.kernels.native import mask
from tests.kernels.against import assert_close, factors, run, truth
from tests.kernels.test_linear import saved


@pytest.fixture(autouse=True, scope="module")
def at_any_size() -> Iterator[None]:
    with kernels.backend("torch"):
        yield


SEED = torch.tensor(0x1234_5678_9ABC_DEF)
dropouts = pytest.mark.parametrize("dropout", [0.0, 0.3])


@pytest.mark.heavy
@dropouts
def test_any_number_of_tokens_is_one_graph(dropout: float) -> None:
    torch.compiler.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(lora_linear, fullgraph=True, dynamic=True, backend=count)
    for tokens in (5, 9, 30):
        tensors = factors(tokens, i=8, o=6, rank=2)
        options = {"scale": 0.5, "dropout": dropout, "seed": SEED}
        assert_close(run(compiled, tensors, torch.float64, **options), truth(tensors, **options))
    assert graphs == 1


@pytest.mark.slow
@dropouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_compiles_both_passes(dropout: float, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    tensors = factors(33, i=24, o=40, rank=4)
    compiled = torch.compile(lora_linear, fullgraph=True)
    options = {"scale": 0.5, "dropout": dropout, "seed": SEED}
    found = run(compiled, tensors, dtype, factors=torch.float32, **options)
    assert_close(found, truth(tensors, **options))


class OnDevice(TorchDispatchMode):
    """Refuses what a CUDA graph can't capture: to wait for a value, or for how many there are."""

    refused = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.refused and "_to_cpu" not in name, name
        return func(*args, **(kwargs or {}))


@dropouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_the_device(
    dropout: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask.KERNEL.ready()  # it's held against torch the first time that it is asked
    monkeypatch.setattr(mask, "drops", lambda x: False)  # C is for a CPU alone
    tensors = factors(33, i=24, o=40, rank=4)
    leaves = [t.to(dtype).requires_grad_() for t in tensors.values()]
    with OnDevice():
        lora_linear(*leaves, 0.5, dropout).sum().backward()


class Int8(Tensor):
    """A weight that is held in 8 bits and a scale for each row, and multiplies itself."""

    @staticmethod
    def __new__(cls, w: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(cls, w.shape, dtype=w.dtype)

    def __init__(self, w: Tensor):
        self.scales = w.abs().amax(1, keepdim=True) / 127
        self.codes = (w / self.scales).round().to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = [a.wide() if isinstance(a, Int8) else a for a in args]
        return func(*args, **(kwargs or {}))

    def wide(self) -> Tensor:
        return self.codes.to(self.dtype) * self.scales


@dropouts
def test_a_quantised_weight_multiplies_itself(dropout: float) -> None:
    tensors = {name: t.float() for name, t in factors(50, i=30, o=40, rank=4).items()}
    w, wanted = Int8(tensors.pop("w")), ("x", "bias", "a", "b")
    options = {"scale": 0.5, "dropout": dropout, "seed": SEED}

    def call(x: Tensor, bias: Tensor, a: Tensor, b: Tensor, **options) -> Tensor:
        return lora_linear(x, w, bias, a, b, **options)

    found = run(call, tensors, torch.float32, wanted, **options)
    true = truth({"x": tensors["x"], "w": w.wide(), **tensors}, wanted, **options)
    del true["w"]
    assert_close(found, true)

    leaves = [t.requires_grad_() for t in tensors.values()]
    own = {t.untyped_storage().data_ptr() for t in leaves}
    kept = saved(lambda: call(*leaves, **options))
    wide = {storage for storage, size in kept.items() if size == w.wide().nbytes}
    # torch's own product of x with the widened W keeps that, and nothing of the size of x is new
    beyond = sum(n for storage, n in kept.items() if storage not in own | wide)
    assert beyond == 50 * 4 * 4 + SEED.nbytes * (dropout > 0)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@dropouts
@pytest.mark.filterwarnings("ignore:.*barrier.*:UserWarning")
def test_fsdp_frees_the_weight_between_the_passes(one_process: None, dropout: float) -> None:
    def gradients(shard: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
        delta = pl.attach(model, pl.LoRA(rank=2, dropout=dropout, targets="*"))
        for parameter in delta.parameters():
            nn.init.normal_(parameter)
        if shard:
            for layer in model[0], model[2]:
                fully_shard(layer, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
        torch.manual_seed(1)
        model(torch.randn(5, 16)).square().sum().backward()
        found = [p.grad for p in delta.parameters()]
        return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]

    for found, true in zip(gradients(shard=True), gradients(shard=False), strict=True):
        torch.testing.assert_close(found, true)


def test_a_transposed_weight_is_read_in_place() -> None:
    tensors = factors(7, i=12, o=9, rank=3)
    turned = tensors | {"w": tensors["w"].t().contiguous()}

    def call(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        return lora_linear(x, w.t(), *rest)

    found, true = run(call, turned, torch.float64), truth(tensors)
    assert_close(found, true | {"w": true["w"].t()})


def test_is_deterministic_when_torch_is_told_to_be() -> None:
    tensors = factors(64, i=96, o=80, rank=16)
    torch.use_deterministic_algorithms(True)
    try:
        found = run(lora_linear, tensors, torch.bfloat16, dropout=0.1, seed=SEED)
    finally:
        torch.use_deterministic_algorithms(False)
    again = run(lora_linear, tensors, torch.bfloat16, dropout=0.1, seed=SEED)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_without_a_weight_it_is_the_low_rank_part() -> None:
    x, w, bias, a, b = factors(6, i=4, o=5, rank=2).values()
    whole = reference.lora_linear(x, w, bias, a, b, 0.5)
    for call in (lora_linear, reference.lora_linear):
        part = call(x, None, None, a, b, 0.5)
        torch.testing.assert_close(part, whole - x @ w.t() - bias)


@pytest.mark.parametrize("shape", [(6,), (2, 3), ()])
def test_its_result_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    def doubled(*leaves: Tensor) -> Tensor:
        y = lora_linear(*leaves)
        y *= 2
        return y

    tensors = factors(*shape, i=4, o=5, rank=2)
    true = {name: 2 * tensor for name, tensor in truth(tensors).items()}
    assert_close(run(doubled, tensors, torch.float64), true)
