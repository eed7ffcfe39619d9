"""A folder written whole or not at all."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from peftlite.errors import FileError
from peftlite.io.files import flush_folder, writing_to


@contextlib.contextmanager
def replacing_folder(path: Path, check: Callable[[set[str]], str | None]) -> Iterator[Path]:
    """A new folder that takes the place of `path` once its body is done, and is gone if it fails.

    It is renamed when it is complete. An older one steps aside just before, so that for an instant
    there is neither; never are files of both in one folder.

    Args:
        check: why what stands at `path`, with these names in it, may not be replaced; None if so.
    """
    with writing_to(path) as path:
        if path.exists() and (why := check({child.name for child in path.iterdir()})):
            raise FileError(f"can't write {str(path)!r}: {why}")
        start = f".{path.name}.{secrets.token_hex(8)}"
        new, old = path.with_name(f"{start}.tmp"), path.with_name(f"{start}.old")
        try:
            new.mkdir()
            yield new
            flush_folder(new)
            if path.exists():
                path.rename(old)
            new.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
        finally:
            for left in (new, old):
                shutil.rmtree(left, ignore_errors=True)
        flush_folder(path.parent)
