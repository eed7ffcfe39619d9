"""Caller: code that runs by itself up to what it asks for, and goes on once it has that.

It is a thread, of which one at a time is awake, so it is written as if it were alone: what it draws
at random on the host, and the modes that it puts the model into, are its own.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peftlite.train.state import generators, set_generators

HOST = torch.device("cpu")


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


class Caller:
    """A function in a thread of its own, asleep until it is run.

    Args:
        name: of the delta that it calls the model with.
        work: what it does; it is given `ask`.
        modes: of the model.

    Attributes:
        asked: what it waits for.
        over: whether it has come to its end: with a result, or an error.
    """

    def __init__(
        self, name: str, work: Callable[[Callable[[Any], Any]], Any], modes: Modes
    ) -> None:
        self.name, self._work, self._modes = name, work, modes
        self.asked: Any = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.over = False
        self._answer: Any = None
        self._state = generators(HOST), modes.now()
        self._wake, self._sleep = threading.Semaphore(0), threading.Semaphore(0)
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._live,), daemon=True)
        self._thread.start()

    def run(self, answer: Any = None) -> None:
        """Runs it up to what it asks for next, or to its end. An exception is raised in it."""
        outside = generators(HOST), self._modes.now()
        self._enter(self._state)
        self._answer, self.asked = answer, None
        self._wake.release()
        self._sleep.acquire()
        self._state = generators(HOST), self._modes.now()
        self._enter(outside)
        if self.over:
            self._thread.join()

    def _enter(self, state: Any) -> None:
        drawn, mode = state
        set_generators(drawn, HOST)
        self._modes.set(mode)

    def end(self) -> None:
        """Ends it where it waits."""
        while not self.over:
            self.run(Ended())

    def ask(self, what: Any) -> Any:
        """Waits for an answer; in the caller's own thread."""
        self.asked = what
        self._sleep.release()
        self._wake.acquire()
        answer = self._answer
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _live(self) -> None:
        self._wake.acquire()
        try:
            if not isinstance(self._answer, BaseException):
                self.result = self._work(self.ask)
        except BaseException as error:
            self.error = error
        finally:
            self.over = True
            self._sleep.release()
