"""Service: many deltas fine-tuned on one base, by clients that each have a loop of their own.

    client a   forward_backward(batch, loss) ┐
    client b   forward_backward(batch, loss) ┼ one batch of the base ─ futures
    client c   optim_step(lr=1e-3)           ┘ each delta's own

What waits when the model is free is answered at once: of each client its first request, so none
waits for another's second. The shape of the requests is Tinker's, for any module and any loss.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from peftlite.bank.bank import DeltaBank, Source
from peftlite.bank.source import delta_of
from peftlite.core.attach import check_name
from peftlite.core.delta import Delta
from peftlite.core.patch import Method
from peftlite.errors import FileError, PeftliteError
from peftlite.io.files import as_path
from peftlite.io.native import base_of, save
from peftlite.methods.lora import LoRA
from peftlite.table import short
from peftlite.train import checkpoints, state
from peftlite.train.measure import Loss, Metrics
from peftlite.train.modes import evaluating, training
from peftlite.train.parallel import Processes
from peftlite.train.schedule import adamw, parameter_groups
from peftlite.train.together.batcher import Batcher, Shared

Optimizer: TypeAlias = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Makes one of parameter groups."""


@dataclass(eq=False)
class Request:
    """What is to be done for a client: on the model, with those of others, or beside it."""

    work: Callable[..., Any]
    on_model: bool
    future: Future[Any] = field(default_factory=Future)

    def end(self, done: Future[Any]) -> None:
        if (error := done.exception()) is None:
            self.future.set_result(done.result())
        else:
            self.future.set_exception(error)


@dataclass(eq=False)
class Tuned:
    """What a client has: its delta, the optimizer, and requests that wait."""

    delta: Delta
    make: Optimizer
    optimizer: torch.optim.Optimizer | None = None
    steps: int = 0
    waiting: deque[Request] = field(default_factory=deque)


class Service:
    """One base that clients fine-tune at once, each a delta of its own, from any thread.

    Requests that wait while the model runs are answered by one forward and backward pass over the
    rows of all. Every delta learns what it would alone, to rounding; only dropout draws otherwise.

    The service is the model's standing choice until `close` takes it off.

    Args:
        model: any module whose inputs have the batch as their first dimension.
        slots: how many clients it has room for.
        max_rank: the largest rank that fits.
        methods: what to make room for, as in `pl.DeltaBank`; if None, `LoRA` in fp32 wherever rows
            can be told apart, and what clients bring before the first request.
        patience: seconds for which a request waits for those of other clients, if they have had
            one answered lately and none is there.

    Raises:
        PeftliteError: as `pl.DeltaBank`.

    Example:
        model, batch = nn.Linear(4, 3), (torch.randn(6, 4), torch.arange(6) % 3)
        with pl.Service(model) as service:
            a, b = service.client("a", pl.LoRA(rank=2)), service.client("b", pl.LoRA(rank=1))
            losses = [c.forward_backward(batch, pl.losses.classification) for c in (a, b)]
            a.optim_step(lr=1e-2)
            print([loss.result()["loss"] for loss in losses])
            a.save("a.safetensors")
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        slots: int = 8,
        max_rank: int = 64,
        methods: Source | Sequence[Source] | None = None,
        patience: float = 0.005,
    ) -> None:
        given = LoRA(rank=max_rank, dtype=torch.float32) if methods is None else methods
        self.model, self._patience = model, patience
        self.bank: DeltaBank = DeltaBank(model, slots, max_rank, given)
        self._batcher = Batcher(self.bank, model, Processes(0, 1))
        self._clients: dict[str, Tuned] = {}
        self._there = threading.Condition()  # of what waits
        self._turn = threading.Lock()  # of what runs
        self._gone: deque[Tuned] = deque()  # those whose slots are to be freed
        self._last: list[Tuned] = []  # who had something answered in the last round
        self._closing = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def client(
        self, name: str, source: Source | Sequence[Method], optimizer: Optimizer = adamw
    ) -> Client:
        """A client with a delta of its own: new, of methods, or of a file or a delta, to go on.

        Args:
            optimizer: makes one of parameter groups.

        Raises:
            PeftliteError: the name is taken, there is no slot, the delta has no room, or the
                service is closed.
            FileError: the file can't be read.
        """
        check_name(name)
        delta = delta_of(self.model, name, source, "error")[0]
        delta.requires_grad_()
        tuned = Tuned(delta, optimizer)
        with self._turn:
            if self._closing:
                raise PeftliteError("the service is closed: make another one")
            self._free()
            if name in self._clients:
                raise PeftliteError(f"the service has a client {name!r} already: give another name")
            self.bank.adopt(name, delta)
            with self._there:
                self._clients[name] = tuned
        client = Client(self, name, tuned)
        # it runs wherever the last one lets go, perhaps amid a round: so it takes a note alone
        weakref.finalize(client, self._gone.append, tuned).atexit = False
        return client

    @property
    def names(self) -> list[str]:
        """The clients that there are."""
        with self._there:
            return [name for name, tuned in self._clients.items() if tuned not in self._gone]

    def drop(self, name: str) -> None:
        """Forgets a client; what it asked for and hasn't been given is cancelled."""
        with self._there:
            tuned = self._clients.get(name)
        if tuned is not None:
            self._forget(tuned)

    def _forget(self, tuned: Tuned) -> None:
        self._gone.append(tuned)
        with self._turn:
            self._free()

    def _free(self) -> None:
        """Frees the slots of clients that are gone; between two rounds."""
        while self._gone:
            tuned = self._gone.popleft()
            name = tuned.delta.name
            with self._there:
                there = self._clients.get(name) is tuned and self._clients.pop(name)
            if there:
                for request in tuned.waiting:
                    request.future.cancel()
                self.bank.evict(name)
                self.bank.drop(name)

    def close(self) -> None:
        """Ends it, once what waits is answered; the model is as it was."""
        with self._there:
            self._closing = True
            self._there.notify_all()
        self._thread.join()
        for name in self.names:
            self.drop(name)
        self.bank.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, tuned: Tuned, work: Callable[..., Any], on_model: bool) -> Future[Any]:
        """Has a request wait its turn. Raises PeftliteError if there is none to come."""
        request = Request(work, on_model)
        with self._there:
            if self._closing or tuned not in self._clients.values():
                raise PeftliteError("this client is closed: ask the service for another")
            tuned.waiting.append(request)
            self._there.notify_all()
        return request.future

    # -- in a thread of its own

    def _serve(self) -> None:
        while requests := self._next():
            with self._turn:
                self._free()
                self._answer(requests)

    def _next(self) -> dict[str, Request]:
        """The first request of each client that has any; none once the service is to end."""

        def there() -> bool:
            return any(tuned.waiting for tuned in self._clients.values())

        def all_there() -> bool:
            clients = self._clients.values()
            return self._closing or all(t.waiting for t in self._last if t in clients)

        with self._there:
            self._there.wait_for(lambda: self._closing or there())
            self._there.wait_for(all_there, self._patience)
            taken = {name: t.waiting.popleft() for name, t in self._clients.items() if t.waiting}
            self._last = [self._clients[name] for name in taken]
        return {n: r for n, r in taken.items() if r.future.set_running_or_notify_cancel()} or (
            self._next() if taken else {}
        )

    def _answer(self, requests: dict[str, Request]) -> None:
        for request in requests.values():
            if not request.on_model:
                try:
                    request.future.set_result(request.work())
                except Exception as error:
                    request.future.set_exception(error)
        given = {name: request for name, request in requests.items() if request.on_model}
        callers = (self._batcher.caller(name, request.work) for name, request in given.items())
        for caller in self._batcher.run(callers, len(given)):
            given[caller.name].end(caller.done)


class Client:
    """A delta in a service, and the requests that are made for it; each gives a future.

    Its requests are answered in their order.
    """

    name: str

    def __init__(self, service: Service, name: str, tuned: Tuned) -> None:
        self.name, self._service, self._tuned = name, service, tuned

    def forward_backward(self, batch: Any, loss: Loss) -> Future[dict[str, float]]:
        """∇ loss(model, batch), added to the gradients; the future has what the loss gave.

        What the delta's methods add to a loss, as AdaLoRA does, goes back with it.

        Args:
            batch: as the loss takes it, on the model's device.
            loss: `f(model, batch)`, a tensor or a dict, as `pl.Trainer` takes it.

        Raises:
            PeftliteError: the client is closed; by the future, the loss isn't a function.
        """
        delta = self._tuned.delta

        def work(shared: Shared) -> dict[str, float]:
            with training(shared):
                value, metrics = _measured(loss, shared, batch)
                shared.back(value + delta.regularizer().to(value.device))
            return metrics

        return self._ask(work, on_model=True)

    def forward(self, batch: Any, loss: Loss) -> Future[dict[str, float]]:
        """What loss(model, batch) gives, in eval mode and without gradients.

        Raises:
            PeftliteError: the client is closed; by the future, the loss isn't a function.
        """

        def work(shared: Shared) -> dict[str, float]:
            with torch.no_grad(), evaluating(shared):
                return _measured(loss, shared, batch)[1]

        return self._ask(work, on_model=True)

    def optim_step(
        self, lr: float, weight_decay: float = 0.0, clip: float = math.inf
    ) -> Future[dict[str, float]]:
        """A step along the gradients so far, which are then none; the future has their norm.

        Args:
            lr: the learning rate of this step.
            weight_decay: of matrices; vectors never decay.
            clip: the largest norm of the gradients.

        Raises:
            PeftliteError: the client is closed, or an argument is no such number; by the future:
                there are no gradients, or they aren't finite. Nothing is changed, but that they are
                gone.
        """
        for what, given in {"lr": lr, "weight_decay": weight_decay, "clip": clip}.items():
            finite = isinstance(given, Real) and (given < math.inf or what == "clip")
            if not finite or not given >= 0:
                raise PeftliteError(f"{what} must be a finite number from 0 up, not {short(given)}")
        return self._ask(lambda: self._step(lr, weight_decay, clip), on_model=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives under the delta, in eval mode, together with what others ask."""

        def work(shared: Shared) -> Any:
            with torch.no_grad(), evaluating(shared):
                return shared(*args, **kwargs)

        return self._ask(work, on_model=True).result()

    def sample(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """What the model's `generate` gives under the delta."""

        def work(shared: Shared) -> Any:
            with torch.no_grad(), evaluating(shared):
                return shared.generate(*args, **kwargs)

        return self._ask(work, on_model=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the delta to a file, for `pl.load`. Raises as `pl.save`."""
        self._ask(lambda: save(self._tuned.delta, path), on_model=False).result()

    def save_state(self, folder: str | os.PathLike[str]) -> None:
        """Writes the delta and its optimizer to a folder, for `load_state`. Raises FileError."""
        self._ask(lambda: self._save_state(as_path(folder)), on_model=False).result()

    def load_state(self, folder: str | os.PathLike[str]) -> None:
        """Goes on from what `save_state` wrote, to the bit. Raises FileError."""
        self._ask(lambda: self._load_state(as_path(folder)), on_model=False).result()

    def close(self) -> None:
        """Frees its slot. What it learned is gone, unless it was saved."""
        self._service._forget(self._tuned)

    def _ask(self, work: Callable[..., Any], on_model: bool) -> Future[Any]:
        return self._service.ask(self._tuned, work, on_model)

    # -- between two rounds, in the service's thread

    def _step(self, lr: float, weight_decay: float, clip: float) -> dict[str, float]:
        tuned = self._tuned
        parameters = [p for p in tuned.delta.parameters() if p.grad is not None]
        if not parameters:
            raise PeftliteError(f"{self.name!r} has no gradients: forward_backward comes first")
        optimizer = self._optimizer(lr)
        norm = float(nn.utils.clip_grad_norm_(parameters, clip))
        if not math.isfinite(norm):
            optimizer.zero_grad()
            raise PeftliteError(f"the gradients of {self.name!r} have norm {norm}: no step is made")
        for group in optimizer.param_groups:
            decays = group["params"][0].dim() > 1
            group.update(lr=lr, weight_decay=weight_decay if decays else 0.0)
        optimizer.step()
        tuned.delta.step()
        optimizer.zero_grad()
        tuned.steps += 1
        return {"grad_norm": norm}

    def _optimizer(self, lr: float = 0.0) -> torch.optim.Optimizer:
        tuned = self._tuned
        optimizer = tuned.optimizer or tuned.make(parameter_groups([tuned.delta], lr, 1.0, 0.0))
        tuned.optimizer = optimizer
        return optimizer

    def _store(self, folder: Path) -> checkpoints.Checkpoints:
        bases = {self.name: base_of(self._tuned.delta, "sha256")}
        return checkpoints.Checkpoints(folder, 1, None, bases)

    @property
    def _names(self) -> dict[nn.Parameter, str]:
        return {p: name for name, p in self._tuned.delta.named_parameters()}

    def _save_state(self, folder: Path) -> None:
        tuned, optimizer = self._tuned, self._optimizer()
        tree = {
            "place": {"step": tuned.steps, "epoch": 0},
            "deltas": {self.name: tuned.delta.state_dict()},
            "optimizer": state.optimizer_state(optimizer, self._names),
        }
        store = self._store(folder)
        with store.locked():
            store.write(f"step-{tuned.steps:08d}", [tuned.delta], tree, "")

    def _load_state(self, folder: Path) -> None:
        tuned, optimizer, store = self._tuned, self._optimizer(), self._store(folder)
        path = store.newest()
        if path is None:
            raise FileError(f"{str(folder)!r} has no state of a client: save_state writes one")
        tree = checkpoints.read(path, [tuned.delta], store.bases)
        state.set_optimizer_state(optimizer, tree["optimizer"], self._names)
        tuned.delta.load_state_dict(tree["deltas"][self.name])
        tuned.steps = tree["place"]["step"]


def _measured(loss: Loss, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, float]]:
    """A loss, and all that its function gave, as numbers."""
    if not callable(loss) or isinstance(loss, type):
        raise PeftliteError(f"loss must be a function, not {short(loss)}")
    metrics = Metrics()
    value, _ = metrics.add(loss(model, batch), 1)
    means = metrics.means("")
    return value, {name.removeprefix("_"): mean for name, mean in means.items()}
