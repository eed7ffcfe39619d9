"""Batcher: many callers of one model, each with a delta of its own, whose calls run as one.

    caller 1   loss(model, batch):   model(x₁) ┐               ┌ y₁   L₁ ┐
    caller 2   loss(model, batch):   model(x₂) ┤ model([x₁ x₂] ┤ y₂   L₂ ┤ (L₁ + L₂).backward()

Rows have nothing to do with each other, so each delta has the gradients that it would have alone. A
call that fits no other runs by itself, and how many that fit run as one is found by the clock: see
`pace.py`. Where that saves nothing they take turns, each forward and back. A way back waits for all
whose calls it may go through; a call outside of training waits for nobody. Of several processes
each has the same callers, which ask for the same in each, in one order: so goes whatever they
exchange.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.bank.bank import DeltaBank
from peftlite.bank.room import NAME
from peftlite.core.choice import Choice
from peftlite.core.find import require
from peftlite.train.parallel import Processes
from peftlite.train.together.call import Call, How, joined, parted
from peftlite.train.together.caller import Caller, Draws, Modes
from peftlite.train.together.pace import Pace

Asking = tuple[Caller, Call]
MEET = object()
"""What a caller asks for that waits for the others."""


class Shared(nn.Module):
    """The model as a caller has it: its calls, and its ways back, run with those of others."""

    def __init__(self, model: nn.Module, choice: Choice, ask: Callable[[Any], Any]) -> None:
        super().__init__()
        self._orig_mod = model  # as torch.compile calls what it wraps
        self.training: bool = model.training
        self._choice, self._ask = choice, ask

        @functools.wraps(model.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._wait(args, kwargs)

        # with the arguments of the model's, for who asks
        self.forward: Callable[..., Any] = forward

    def _wait(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        chosen = self._choice.now()
        if not (chosen == () or (isinstance(chosen, tuple) and NAME in chosen)):
            return self._orig_mod(*args, **kwargs)  # a choice of the caller's own
        return self._ask(Call(How.now(self._orig_mod.training), bool(chosen), args, kwargs))

    def back(self, loss: Tensor) -> None:
        """`loss.backward()`, with those of the others; by itself if it goes nowhere, and raises."""
        self._ask(loss) if loss.requires_grad else loss.backward()

    def meet(self) -> None:
        """Waits until all others that are there do, too."""
        self._ask(MEET)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._orig_mod, name)


class Batcher:
    """Runs callers, and answers what they ask for.

    Args:
        bank: has the delta that each caller is named by.
        model: the bank's, or what wraps it.
        processes: that do the same, of which this is one.
    """

    def __init__(self, bank: DeltaBank, model: nn.Module, processes: Processes) -> None:
        self.bank, self.model, self.processes = bank, model, processes
        self.modes, self.draws = Modes(bank.model), Draws()
        self._choice = require(bank.model)[1].choice
        self._live: list[Caller] = []
        self._ahead: set[Caller] = set()  # whose calls are yet to be gone back through
        self._paces = {True: Pace(), False: Pace()}  # of calls with gradients, and without
        self._spent = self._sizes = 0.0  # seconds, on what those that are ahead gave
        self._warned = False

    def caller(self, name: str, work: Callable[[Shared], Any]) -> Caller:
        """Code that calls the model with a delta of the bank, in training or not."""

        def run(ask: Callable[[Any], Any]) -> Any:
            with self.bank.use(name):  # for what calls a part of the model by itself
                return work(Shared(self.model, self._choice, ask))

        return Caller(name, run, self.modes, self.draws)

    def run(self, callers: Iterable[Caller], most: int) -> Iterable[Caller]:
        """Gives callers as they are over; of those to come, `most` are there at a time."""
        coming = iter(callers)
        try:
            while True:
                while len(self._live) < most and (new := next(coming, None)) is not None:
                    self._live.append(new)
                    new.run()
                over = [caller for caller in self._live if caller.done.done()]
                for caller in over:
                    self._live.remove(caller)
                    self._ahead.discard(caller)
                    self.draws.forget(caller)
                    yield caller
                if not (over or self._live):
                    return
                if not over:
                    self._answer()
        finally:
            for caller in self._live:
                caller.end()
            self._live.clear()
            self.draws.give(None)

    def _answer(self) -> None:
        """Answers some of what is asked for, at least one."""
        if all(caller.asked is MEET for caller in self._live):
            for caller in self._live:
                caller.run()
            return
        calls = [(c, c.asked) for c in self._live if isinstance(c.asked, Call)]
        outside = [(c, call) for c, call in calls if not call.how.gradients]
        back = [c for c in self._live if isinstance(c.asked, Tensor)]
        self._forward(outside)
        inside = [(c, call) for c, call in calls if call.how.gradients]
        if back and self._ahead <= {*back}:
            self._backward(back)
        elif self._ahead:
            self._forward([(c, call) for c, call in inside if c in self._ahead])
        elif inside:
            self._forward(next(iter(self._grouped(inside)))[: self._most(inside)])

    def _most(self, asking: Sequence[Asking]) -> int:
        """How many of the calls that fit each other run as one."""
        if self.processes.size > 1 or self.model is not self.bank.model:
            return len(asking)  # whose clocks differ; and each number is a graph of its own
        if torch.are_deterministic_algorithms_enabled():
            return len(asking)  # no clock is
        return self._paces[asking[0][1].how.gradients].next()

    # -- forward

    def _forward(self, asking: Sequence[Asking]) -> None:
        answers: dict[Caller, tuple[Any, Exception | None]] = {}
        for group in self._grouped(asking):
            left = [*group]
            while left:
                most = len(left) if left[0][1].how.gradients else self._most(left)
                part, left = left[:most], left[most:]
                outputs = self._timed(part)
                answers.update(zip((caller for caller, _ in part), outputs, strict=True))
        self._ahead.update(caller for caller, call in asking if call.how.gradients)
        for caller, _ in asking:
            self._live.remove(caller)  # whoever was answered is the last to be so again
            self._live.append(caller)
            caller.run(*answers.pop(caller))

    def _timed(self, group: Sequence[Asking]) -> Sequence[tuple[Any, Exception | None]]:
        """The outputs of a group; the pace notes how long they took."""
        began = perf_counter()
        outputs = self._outputs(group)
        seconds, size = perf_counter() - began, sum(call.size for _, call in group)
        if group[0][1].how.gradients:
            self._spent, self._sizes = self._spent + seconds, self._sizes + size
        else:
            self._paces[False].note(len(group), seconds / max(size, 1))
        return outputs

    def _grouped(self, asking: Sequence[Asking]) -> Iterable[Sequence[Asking]]:
        """The calls that run as one: those that fit each other, in every process."""
        firsts: list[Call] = []
        numbers = []
        for _, call in asking:
            number = next((i for i, first in enumerate(firsts) if call.fits(first)), len(firsts))
            firsts += [call] if number == len(firsts) else []
            numbers.append(number)
        groups: dict[tuple[int, ...], list[Asking]] = {}
        of_all = self.processes.all_gather(numbers) if asking else []
        for asked, *number in zip(asking, *of_all, strict=True):
            groups.setdefault(tuple(number), []).append(asked)
        return groups.values()

    def _outputs(self, group: Sequence[Asking]) -> Sequence[tuple[Any, Exception | None]]:
        """What each has of the output of all, or the error that it raises by itself."""
        try:
            output = self._call(group)
        except Exception as error:
            return [(None, error)] if len(group) == 1 else self._one_by_one(group)
        if len(group) == 1:
            return [(output, None)]
        parts = parted([call for _, call in group], output)
        if parts is not None:
            return [(part, None) for part in parts]
        if not self._warned:
            warnings.warn(
                "the model's output can't be told apart by rows, so calls run one by one: have it "
                "give outputs per row alone (no labels, use_cache=False)",
                stacklevel=2,
            )
        self._warned = True
        return self._one_by_one(group)

    def _one_by_one(self, group: Sequence[Asking]) -> Sequence[tuple[Any, Exception | None]]:
        return [self._outputs([asking])[0] for asking in group]

    def _call(self, group: Sequence[Asking]) -> Any:
        calls = [call for _, call in group]
        how, (args, kwargs) = calls[0].how, joined(calls)
        rows = [
            caller.name if call.changed else None
            for caller, call in group
            for _ in range(call.rows or 1)
        ]
        before = self.modes.now()
        self.draws.give(None)
        self.modes.set(how.training)
        try:
            with how.again():
                with self.bank.train(rows) if how.gradients else self.bank.rows(rows):
                    return self.model(*args, **kwargs)
        finally:
            self.modes.set(before)

    # -- backward

    def _backward(self, callers: Sequence[Caller]) -> None:
        failed: Exception | None = None
        self.draws.give(None)
        began = perf_counter()
        try:
            torch.autograd.backward([caller.asked for caller in callers])
        except Exception as error:
            failed = error
        self._spent += perf_counter() - began
        self._paces[True].note(len(callers), self._spent / max(self._sizes, 1))
        self._spent = self._sizes = 0.0
        self._ahead.clear()
        for caller in callers:
            caller.run(error=failed)
