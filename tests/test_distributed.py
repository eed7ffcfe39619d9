"""Law 13: DDP, FSDP2 and activation checkpointing train a delta as one plain process does."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import peftlite as pl
from tests.cells import close, disturb
from tests.digest import bits
from tests.zoo import GPT, KINDS, Kind, seeded

pytestmark = pytest.mark.heavy


class CheckpointedGPT(GPT):
    """The small GPT with its blocks recomputed in the backward pass."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        if not x.requires_grad:  # the reentrant kind passes no gradient on where its input has none
            x.requires_grad_()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.lm_head(self.norm(x))


def checkpointed(reentrant: bool) -> Kind:
    return replace(GPT_KIND, name="gpt_checkpointed", make=lambda: CheckpointedGPT(reentrant))


WORLD = 2
METHODS = (pl.LoRA(rank=2), pl.BitFit(), pl.FullTuning())
GPT_KIND, *OTHERS = (k for k in KINDS if k.name in ("gpt", "gpt_tied", "mha_encoder"))
PACKED = replace(GPT_KIND, name="gpt_packed", packed=True)
SPREAD = (GPT_KIND, *OTHERS, checkpointed(reentrant=False))
CELLS = [*product(SPREAD, METHODS), (PACKED, METHODS[0])]

Grads = dict[str, Tensor]


def attached(kind: Kind, method: pl.Method) -> tuple[nn.Module, pl.Delta]:
    """The kind's model in training, with a delta that makes a difference."""
    model = kind.model().train()
    with seeded(1):
        return model, disturb(pl.attach(model, method, "a"))


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from the processes it's spread over."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(kind: Kind, model: nn.Module, delta: pl.Delta, batch: dict[str, Tensor]) -> Grads:
    """Three steps; the gradients of the first."""
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1, momentum=0.9)
    first: Grads = {}
    for _ in range(3):
        kind.run(model, batch).square().mean().backward()
        first = first or {name: whole(p.grad).clone() for name, p in delta.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return first


def all_close(found: Grads, expected: Grads) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda text, n=name: f"{n}: {text}")


# -- the wrappers; each gives the model to call


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.blocks if isinstance(model, GPT) else model[0].layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# -- what every process checks


def trains_as_one(
    rank: int, folder: Path, kind: Kind, method: pl.Method, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    """Half the batch in each of two processes is the whole batch in one."""
    batch, base = kind.batch(2 * WORLD), kind.model()
    model, delta = attached(kind, method)
    expected = train(kind, model, delta, batch)
    trained = {name: p.detach() for name, p in delta.named_parameters()}
    pl.merge(model, "a")
    merged = kind.run(model.eval(), batch)

    model, delta = attached(kind, method)
    wrapped = wrap(model)
    mine = {key: rows[2 * rank : 2 * rank + 2] for key, rows in batch.items()}
    all_close(train(kind, wrapped, delta, mine), expected)
    all_close({name: whole(t) for name, t in delta.state_dict().items()}, trained)
    assert pl.deltas(wrapped) == {"a": delta}
    chooses_and_merges(kind, wrapped.eval(), base, batch, merged)
    saves_as_one(rank, folder, kind, wrapped, batch)
    now = dict(model.named_parameters())
    for name, parameter in base.named_parameters():
        assert bits(whole(now[name])) == bits(parameter), name
    pl.detach(wrapped, "a")
    assert list(model.state_dict()) == list(base.state_dict())
    close(kind.run(wrapped, batch), kind.run(base, batch))


def chooses_and_merges(
    kind: Kind, model: nn.Module, base: nn.Module, batch: dict[str, Tensor], merged: Tensor
) -> None:
    on, off = kind.run(model, batch), kind.run(base, batch)
    with pl.using(model, None):
        close(kind.run(model, batch), off)
    with pl.using(model, rows=["a", None] * WORLD):
        mixed = kind.run(model, batch)
    close(mixed[::2], on[::2])
    close(mixed[1::2], off[1::2])
    pl.merge(model, "a")
    close(kind.run(model, batch), merged)
    pl.unmerge(model, "a")


def saves_as_one(
    rank: int, folder: Path, kind: Kind, model: nn.Module, batch: dict[str, Tensor]
) -> None:
    """Every process writes the same file, which one plain process loads."""
    path = folder / f"{rank}.safetensors"
    pl.save(pl.deltas(model)["a"], path)
    dist.barrier()
    assert path.read_bytes() == (folder / "0.safetensors").read_bytes()
    plain, output = kind.model(), kind.run(model, batch)
    loaded = pl.load(plain, path)
    close(kind.run(plain, batch), output)
    with torch.no_grad():
        for parameter in pl.deltas(model)["a"].parameters():
            parameter.zero_()
    pl.deltas(model)["a"].load_state_dict(loaded.state_dict())
    close(kind.run(model, batch), output)
    dist.barrier()  # the next check writes there again


def sharded_after_attaching() -> None:
    """Patches that come after `fully_shard` would train without their gradients in step."""
    kind = GPT_KIND
    model = fsdp(kind.model())
    with pytest.raises(pl.PeftliteError, match="before fully_shard"):
        pl.attach(model, METHODS[0])
    model, _ = attached(kind, METHODS[0])
    pl.detach(fsdp(model), "a")
    with pytest.raises(pl.PeftliteError, match="before fully_shard"):
        pl.attach(model, METHODS[0])


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    for wrap in (ddp, fsdp):
        for kind, method in CELLS:
            try:
                trains_as_one(rank, folder, kind, method, wrap)
            except Exception as error:
                raise AssertionError(f"{wrap.__name__}: {method} on {kind}") from error
    sharded_after_attaching()
    dist.destroy_process_group()


def test_ddp_and_fsdp2_train_as_one_process(tmp_path: Path) -> None:
    # starting processes costs more than all that they check
    torch.multiprocessing.spawn(process, args=(tmp_path,), nprocs=WORLD)


@pytest.mark.parametrize("method", [*METHODS, pl.LoRA(rank=2, dropout=0.5)])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_give_the_same_gradients(method: pl.Method, reentrant: bool) -> None:
    expected, found = {}, {}
    for kind, grads in ((GPT_KIND, expected), (checkpointed(reentrant), found)):
        model, delta = attached(kind, method)
        with seeded(2):  # for dropout
            kind.run(model, kind.batch()).square().mean().backward()
        grads |= {name: p.grad for name, p in delta.named_parameters()}
    all_close(found, expected)
