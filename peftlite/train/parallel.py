"""Processes: several that train one model together, and what they exchange.

Each has the whole of the delta and a share of every batch. A delta is small, so its gradients are
summed once, after the backward pass: nothing is put around the model, any parameter may be left out
of a step, and the numbers are those of one process that takes its batch in as many parts.
"""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peftlite.core.delta import Delta
from peftlite.core.tensors import is_sharded
from peftlite.errors import PeftliteError
from peftlite.io.fingerprint import fingerprint
from peftlite.table import listed
from peftlite.train.modes import blocks
from peftlite.train.state import mix_seeds

Parallel = Literal["auto", "ddp", "fsdp", None]
Result = TypeVar("Result")

LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, and others as it does, put into the environment."""


def world_size(parallel: Parallel) -> int:
    """How many processes train together. Raises PeftliteError for a way that needs several."""
    if parallel is not None and dist.is_available():
        if dist.is_initialized():
            return dist.get_world_size()
        if all(name in os.environ for name in LAUNCH):
            return int(os.environ["WORLD_SIZE"])
    if parallel in (None, "auto"):
        return 1
    raise PeftliteError(
        f"parallel={parallel!r} is for several processes, and this one was started alone: "
        "torchrun --nproc-per-node=N script.py starts N"
    )


def is_first() -> bool:
    """Whether this process is the first of those that were started, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def local_device() -> torch.device:
    """The accelerator with this process's number on its machine, or the CPU where there is none."""
    found = torch.accelerator.current_accelerator()
    if found is None or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(found.type, int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def process_group(parallel: Parallel) -> Iterator[Processes]:
    """The processes for as long as they train; where one ends early, the others don't wait."""
    if world_size(parallel) == 1:
        yield Processes(0, 1)
        return
    if not dist.is_initialized():
        dist.init_process_group()
        atexit.register(_leave)
    hosts = dist.new_group(backend="gloo")  # objects and numbers don't wait for a device
    dist.barrier(hosts)  # one that leaves at once, by an error, cuts off none that still joins
    processes = Processes(dist.get_rank(), dist.get_world_size(), hosts)
    try:
        yield processes
    finally:
        dist.destroy_process_group(hosts)
        processes.hosts = None  # a group's threads end with it, and before Python does


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class Processes:
    """The processes that train together, as one of them sees them.

    Every method is a collective: all processes have to call it, in one order.

    Args:
        hosts: the group by which the CPUs exchange objects and numbers.
    """

    rank: int
    size: int
    hosts: Any

    def __init__(self, rank: int, size: int, hosts: Any = None) -> None:
        self.rank, self.size, self.hosts = rank, size, hosts

    @property
    def first(self) -> bool:
        """Whether this process is the first."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """One for each process, so that dropout differs; the first has the seed itself."""
        return seed if self.first else mix_seeds(seed, 0, self.rank) >> 1

    # -- between the hosts

    def all_gather(self, value: Any) -> list[Any]:
        """The value of each process."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.hosts)
        return values

    def broadcast(self, value: Any) -> Any:
        """The value of the first process."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, group=self.hosts)
        return values[0]

    def on_first(self, function: Callable[[], Result]) -> Result:
        """A function called in the first process: all have its result, or raise its error."""
        value, error = None, None
        if self.first:
            try:
                value = function()
            except Exception as raised:
                error = raised
        value, error = self.broadcast((value, error))
        if error is not None:
            raise error
        return value

    def sum(self, numbers: Sequence[int]) -> list[int]:
        """Each number summed over the processes."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, device="cpu")
        dist.all_reduce(sums, group=self.hosts)
        return sums.tolist()

    def check_same(self, what: str, own: Mapping[str, Any], advice: str) -> None:
        """Raises PeftliteError, in all processes, unless each has the same."""
        first, *others = self.all_gather(dict(own))
        for rank, other in enumerate(others, 1):
            keys = dict.fromkeys((*first, *other))
            if differing := [key for key in keys if first.get(key) != other.get(key)]:
                differences = listed(
                    f"{k} is {first.get(k)}, and {other.get(k)}" for k in differing
                )
                raise PeftliteError(
                    f"{what} of process 0 and of process {rank} differ: {differences}: {advice}"
                )

    def check_fields(self, names: Sequence[str]) -> None:
        """Raises PeftliteError, in all processes, unless a loss gave the same fields in each."""
        checksum = crc32(repr(names).encode())
        if self.sum([checksum]) != [checksum * self.size]:  # every step: a number is quickly summed
            advice = "give all of them for every batch"
            self.check_same("the losses", {"fields": listed(names, 99)}, advice)

    # -- between the devices

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Sums tensors over the processes, in place: those of a device and dtype at a time."""
        if self.size == 1:
            return
        alike: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        for bucket in alike.values():
            sums = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(sums)
            parts = sums.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def all_reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums gradients; a parameter has one if it has one anywhere, as in one process."""
        if self.size == 1:
            return
        counts = self.sum([p.grad is not None for p in parameters])
        for parameter, count in zip(parameters, counts, strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.all_reduce(p.grad for p in parameters if p.grad is not None)

    # -- the model

    def broadcast_deltas(
        self, model: nn.Module, deltas: Sequence[Delta], device: torch.device
    ) -> None:
        """Gives all processes the first one's deltas.

        Raises PeftliteError if the bases differ, or two processes are on one device.
        """
        if self.size == 1:
            return
        places = self.all_gather((socket.gethostname(), device))
        if device.type != "cpu" and len({*places}) < self.size:
            raise PeftliteError(
                f"several processes train on {device} of {places[self.rank][0]}: begin the script "
                f"with torch.{device.type}.set_device(int(os.environ['LOCAL_RANK']))"
            )
        for delta in deltas:
            own = {key: tensor.cpu() for key, tensor in delta.state_dict().items()}
            delta.load_state_dict(self.broadcast(own))
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.check_same(
            "the models",
            {k: fingerprint(t, "sampled") for k, t in tensors.items() if not is_sharded(t)},
            "load the same weights in each, or call torch.manual_seed before making the model",
        )


def shard(model: nn.Module, deltas: Sequence[Delta]) -> None:
    """Shards all but the deltas over the processes, by FSDP2; the model stays so.

    A block of an `nn.ModuleList` is gathered only while it computes. A model on the CPU comes to
    each process's own device, if it has one, a shard of a block at a time.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(model, FSDPModule):
        return
    device = local_device()
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    own = {parameter for delta in deltas for parameter in delta.parameters()}
    for module in [*blocks(model), model]:
        fully_shard(module, mesh=mesh, ignored_params=own)
    for parameter in own:
        parameter.data = parameter.data.to(device)


def will_shard(parallel: Parallel, model: nn.Module) -> bool:
    """Whether there are several processes, and the base is to be sharded over them."""
    if world_size(parallel) == 1:
        return False
    return parallel == "fsdp" or (parallel == "auto" and _is_large(model))


def _is_large(model: nn.Module) -> bool:
    """Whether a model takes more than half of a device's memory, where that can be asked."""
    device = local_device()
    if device.type == "cpu" or not hasattr(torch.get_device_module(device), "mem_get_info"):
        return False
    _, total = torch.get_device_module(device).mem_get_info(device)
    return sum(p.nbytes for p in model.parameters()) > total / 2


def check_unsharded(deltas: Iterable[Delta]) -> None:
    """Raises PeftliteError for a delta that is itself sharded over processes."""
    for delta in deltas:
        if any(is_sharded(parameter) for parameter in delta.parameters()):
            raise PeftliteError(
                f"the parameters of {delta.name!r} are sharded: leave fully_shard to "
                "Trainer(parallel='fsdp'), or give it ignored_params=set(delta.parameters())"
            )
