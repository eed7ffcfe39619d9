"""Caller: code that runs by itself up to what it asks for, and goes on once it has that.

It is a thread, of which one at a time is awake, so it is written as if it were alone: what it draws
at random on the host, and the modes that it puts the model into, are its own.
"""

from __future__ import annotations

import contextvars
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from torch import nn


class Ended(BaseException):
    """Raised in a caller that is to end where it waits: it puts back what it changed."""


class Modes:
    """The modes of a model's modules, as they are in training and out of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._known: dict[bool, list[tuple[nn.Module, bool]]] = {}

    def now(self) -> bool:
        """Whether the model is in training; how its modules are then is noted the first time."""
        flag = self.model.training
        if flag not in self._known:
            own = [(m, vars(m).get("training", m.training)) for m in self.model.modules()]
            self._known[flag] = own
        return flag

    def set(self, flag: bool) -> None:
        """Puts the model back into what was noted."""
        if self.model.training != flag:
            for module, own in self._known[flag]:
                module.training = own


class Draws:
    """Whose numbers Python's, NumPy's and torch's generators of the host draw: nobody's, to begin.

    Who is given them for the first time draws what comes next.
    """

    def __init__(self) -> None:
        self._who: Any = None
        self._states: dict[Any, tuple[Any, ...]] = {}

    def give(self, who: Any) -> None:
        if who is self._who:
            return
        before = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
        self._states[self._who], self._who = before, who
        if who in self._states:
            own, bits, drawn = self._states.pop(who)
            random.setstate(own)
            torch.set_rng_state(drawn)
        else:
            bits = np.random.MT19937()
            bits.state = np.random.get_bit_generator().state
        np.random.set_bit_generator(bits)

    def forget(self, who: Any) -> None:
        """Who is over draws no more."""
        self.give(None)
        self._states.pop(who, None)


class Caller:
    """A function in a thread of its own, asleep until it is run.

    Args:
        name: of the delta that it calls the model with.
        work: what it does; it is given `ask`.
        modes: of the model.
        draws: shared with the other callers.

    Attributes:
        asked: what it waits for.
        done: what it gives in the end, or its error.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Callable[[Any], Any]], Any],
        modes: Modes,
        draws: Draws,
    ) -> None:
        self.name, self._work, self._modes, self._draws = name, work, modes, draws
        self.asked: Any = None
        self.done: Future[Any] = Future()
        self._answer: Future[Any] = Future()
        self._mode = modes.now()
        self._wake, self._sleep = threading.Lock(), threading.Lock()
        self._wake.acquire()
        self._sleep.acquire()
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._live,), daemon=True)
        self._thread.start()

    def run(self, answer: Any = None, error: BaseException | None = None) -> None:
        """Runs it up to what it asks for next, or to its end, with an answer or an error."""
        outside = self._modes.now()
        self._draws.give(self)
        self._modes.set(self._mode)
        self._answer, self.asked = Future(), None
        self._answer.set_result(answer) if error is None else self._answer.set_exception(error)
        self._wake.release()
        self._sleep.acquire()
        self._mode = self._modes.now()
        self._modes.set(outside)
        if self.done.done():
            self._thread.join()

    def end(self) -> None:
        """Ends it where it waits."""
        while not self.done.done():
            self.run(error=Ended())

    def ask(self, what: Any) -> Any:
        """Waits for an answer; in the caller's own thread."""
        self.asked = what
        self._sleep.release()
        self._wake.acquire()
        return self._answer.result()

    def _live(self) -> None:
        self._wake.acquire()
        try:
            self._answer.result()
            self.done.set_result(self._work(self.ask))
        except BaseException as error:
            self.done.set_exception(error)
        finally:
            self._sleep.release()
