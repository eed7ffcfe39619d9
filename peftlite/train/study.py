"""Study: the trials that are over, a line of JSON each, in a file that outlives the process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from peftlite.errors import FileError
from peftlite.fields import as_typed
from peftlite.io.files import as_path, replacing
from peftlite.table import listed

FORMAT = 1


class Study:
    """A file whose first line says what search it is of, and each further one how a trial went.

    Without a path nothing is kept.
    """

    def __init__(self, path: str | os.PathLike[str] | None, about: dict[str, Any]) -> None:
        self.path: Path | None = None if path is None else as_path(path)
        self.about: dict[str, Any] = {"format": FORMAT, **about}
        self._file: Any = None

    @contextmanager
    def opened(self) -> Iterator[list[dict[str, Any]]]:
        """The trials so far, while others are added. Raises FileError if it is another's."""
        if self.path is None:
            yield []
            return
        lines = self._lines(self.path)
        with replacing(self.path) as file:  # without a line that was torn
            file.writelines(_line(line) for line in [self.about, *lines])
        with self.path.open("ab") as self._file:
            yield lines

    def add(self, trial: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(_line(plain(trial)))
            self._file.flush()
            os.fsync(self._file.fileno())

    def _lines(self, path: Path) -> list[dict[str, Any]]:
        try:
            raw = path.read_bytes().splitlines(True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FileError(f"{str(path)!r} can't be read: {error.strerror}") from error
        complete = [line for line in raw if line.endswith(b"\n")]
        try:
            head, *lines = [dict(json.loads(line)) for line in complete] or [self.about]
        except (ValueError, TypeError) as error:
            raise FileError(f"{str(path)!r} is no file of a search: {error}") from error
        if others := [key for key, value in self.about.items() if head.get(key) != value]:
            differences = listed(f"{k}={head.get(k)!r}, not {self.about[k]!r}" for k in others)
            raise FileError(
                f"{str(path)!r} is of another search, {differences}: go on with that one, or give "
                "another file"
            )
        return lines


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def plain(value: Any) -> Any:
    """A value as JSON holds it; what it can't hold, such as a method, as it prints."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, str | int | float | None):
        return value
    return as_typed(value) if is_dataclass(value) else repr(value)
