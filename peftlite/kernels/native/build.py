"""Build: a C file of this folder as a library in the user's cache, by the machine's own compiler.

A library's name holds a hash of all that it depends on: the text of the file and its headers, the
flags, and the compiler. So a cache may be shared by versions, and is never out of date. It takes
its name when it's whole; two processes that build the same one put the same in the same place.

What is loaded runs as the user. So nobody else may be able to write to the cache, or to replace it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SECONDS = 60
"""That a compiler may take."""

_HERE = Path(__file__).parent
_FLAGS = (
    *("-O3", "-std=c11", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing"),
    "-Werror=pointer-arith",  # a pointer to any number would be moved by bytes
)


class Unavailable(Exception):
    """Why there is no library, in words that a report prints."""


def library(name: str, flags: tuple[str, ...]) -> Path:
    """The library of a C file, which is built if there is none yet."""
    compiler = _compiler()
    flags = (*_FLAGS, *flags)
    folder = _trusted(_cache())
    path = folder / f"{name}-{_key(name, flags, compiler)}.so"
    if not path.exists():
        _build(name, flags, compiler, path)
    return _own(path)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftlite" / "native"


def _compiler() -> list[str]:
    words = os.environ.get("CC", "").split() or ["cc"]
    found = shutil.which(words[0])
    if found is None:
        raise Unavailable(f"there is no C compiler {words[0]!r}")
    return [found, *words[1:]]


def _key(name: str, flags: tuple[str, ...], compiler: list[str]) -> str:
    made = Path(compiler[0]).resolve()
    about = [*flags, *compiler, str(made), str(made.stat().st_size), str(made.stat().st_mtime_ns)]
    sources = [_HERE / f"{name}.c", *sorted(_HERE.glob("*.h"))]
    text = "\0".join([*about, *(source.read_text() for source in sources)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _trusted(folder: Path) -> Path:
    """The folder, made if need be, in which nobody else can put a library."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        for place in (folder, *folder.parents):
            about = place.lstat()
            # in a sticky folder, as /tmp is, others can't replace what isn't theirs
            shared = place != folder and about.st_mode & stat.S_ISVTX
            others = 0 if shared else about.st_mode & (0o022 if place == folder else 0o002)
            if about.st_uid not in (os.getuid(), 0) or others:
                raise Unavailable(f"the cache {folder} isn't safe: others can write to {place}")
    except OSError as error:
        raise Unavailable(f"the cache {folder} can't be made: {error.strerror}") from error
    return folder


def _own(path: Path) -> Path:
    about = path.lstat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022 or not stat.S_ISREG(about.st_mode):
        raise Unavailable(f"{path} isn't this user's alone")
    return path


def _build(name: str, flags: tuple[str, ...], compiler: list[str], path: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as room:
            made = Path(room, path.name)
            _run([compiler[0], *flags, *compiler[1:], str(_HERE / f"{name}.c"), "-o", str(made)])
            made.chmod(0o700)
            made.replace(path)
    except OSError as error:
        raise Unavailable(f"the cache {path.parent} can't be written: {error.strerror}") from error


def _run(command: list[str]) -> None:
    """Runs a compiler, which ends in time with all that it started."""
    none, pipe = subprocess.DEVNULL, subprocess.PIPE
    quiet: Any = {"stdin": none, "stdout": none, "stderr": pipe}
    with subprocess.Popen(command, start_new_session=True, text=True, **quiet) as process:
        try:
            _, said = process.communicate(timeout=SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise Unavailable(f"{command[0]} took more than {SECONDS} s") from None
            raise
    if process.returncode:
        line = next((line for line in said.splitlines() if "error" in line), said[:200])
        raise Unavailable(f"{command[0]} failed: {line.strip()}")
