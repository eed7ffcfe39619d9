"""Kernel: a C file, built, checked and loaded when it is first wanted, or the reason why not."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from peftlite.kernels.native import build, features
from peftlite.kernels.native.build import Unavailable

PLAIN = (Tensor, torch.nn.Parameter)
transforms = torch._C._functorch.peek_interpreter_stack  # None outside of any of torch.func
_building = threading.RLock()
_forked = False  # libgomp has no pool in a child; torch's own operations hang there


@dataclass(eq=False)
class Kernel:
    """One C file and what it wants of a CPU.

    Args:
        name: the file's, and what `PEFTLITE_NATIVE` knows it by.
        needs: the CPU's flags, as Linux names them.
        flags: the compiler's.
        ran: the makers of CPUs on which it has run; it's off on others unless it is asked for.
        does: what it does, in words that a report prints.
        agrees: whether what it computes is right, of a small input.
    """

    name: str
    needs: tuple[str, ...]
    flags: tuple[str, ...]
    ran: tuple[str, ...]
    does: str
    agrees: Callable[[Any], bool]
    lib: Any = None
    why: str = ""
    _settled: bool = field(default=False)

    def ready(self) -> bool:
        """Whether it can be called, by `lib`; `why` says why, or why not."""
        if not self._settled:
            with _building:
                if not self._settled:
                    self._settle()
        return self.lib is not None

    def _settle(self) -> None:
        try:
            self._wanted()
            lib: Any = ctypes.CDLL(str(build.library(self.name, self.flags)))
            lib.join_team(_team())
            if hasattr(lib, "begin") and lib.begin():
                raise Unavailable("the system gives no leave for it")
            if not self.agrees(lib):
                raise Unavailable("what it computes differs from plain torch")
            self.lib, self.why = lib, self.does
        except Unavailable as error:
            self.why = str(error)
        except OSError as error:
            self.why = f"it can't be loaded: {error}"
        self._settled = True

    def _wanted(self) -> None:
        """Raises Unavailable, with the reason, where it isn't wanted or can't run."""
        asked = os.environ.get("PEFTLITE_NATIVE", "1")
        if asked == "0":
            raise Unavailable("PEFTLITE_NATIVE is 0")
        vendor, flags = features.vendor_and_flags()
        if lacking := [flag for flag in self.needs if flag not in flags]:
            raise Unavailable(f"this CPU has no {' and '.join(lacking)}")
        if vendor not in self.ran and self.name not in asked.split(","):
            raise Unavailable(
                f"it hasn't been tried on a CPU of {vendor}: PEFTLITE_NATIVE={self.name} has it run"
            )


def threads() -> int:
    """As many as torch has, which share the work."""
    return 1 if _forked else torch.get_num_threads()


def is_plain(*tensors: Tensor) -> bool:
    """Whether tensors are just memory of this machine, one number after another."""
    return is_memory(*tensors) and all(tensor.is_contiguous() for tensor in tensors)


def is_memory(*tensors: Tensor) -> bool:
    """Whether tensors are just memory of this machine."""
    for tensor in tensors:
        if type(tensor) not in PLAIN or not tensor.is_cpu:
            return False
    return not is_compiling() and transforms() is None


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def _team() -> ctypes.c_void_p | None:
    """GOMP_parallel of the OpenMP that torch runs on; None has one thread do everything."""
    maps = Path("/proc/self/maps").read_text()
    for path in sorted(set(re.findall(r"/\S*lib(?:gomp|iomp5)\S*\.so\S*", maps))):
        found = ctypes.CDLL(path)
        if "torch" in path and hasattr(found, "GOMP_parallel"):
            return ctypes.cast(found.GOMP_parallel, ctypes.c_void_p)
    return None
