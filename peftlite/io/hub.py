"""The hub: a delta by a repository's name, fetched as safetensors and JSON alone.

    ORG/NAME[/PATH][@REVISION]

What is here by that name goes first. Nothing else is asked of the hub, and huggingface_hub, which
keeps what was fetched, is imported when it's used.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from peftlite.errors import FileError, PeftliteError, reason
from peftlite.io.files import as_path
from peftlite.io.peft.folder import CONFIG
from peftlite.table import listed, short

OURS, TENSORS = "delta.safetensors", ".safetensors"
_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)((?:/\w[\w.-]*)*)(?:@(\w[\w./-]*))?")
_FILE = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|gguf|json|zip)")
_ADAPTER = re.compile(r"adapter\w*\.safetensors|model_head\.safetensors|\w+\.json")  # of any peer


class Name(NamedTuple):
    """A repository, a path in it, and a branch, a tag or a commit."""

    repo: str
    path: str = ""
    revision: str | None = None

    @classmethod
    def of(cls, given: Any) -> Name | None:
        """What a name means on the hub; None if it can't be one."""
        found = _NAME.fullmatch(given) if isinstance(given, str) else None
        if found is None or _FILE.fullmatch(found[1]):
            return None
        return cls(found[1], found[2].removeprefix("/"), found[3])

    def __str__(self) -> str:
        inside = f"/{self.path}" if self.path else ""
        return f"{self.repo}{inside}" + (f"@{self.revision}" if self.revision else "")


class Located(NamedTuple):
    """Where a file is, and the name that it has on the hub, with its commit, if it's from there."""

    path: Path
    source: Name | None = None

    @property
    def name(self) -> str | None:
        """What a delta is called whose file doesn't say it."""
        its = self.source
        return None if its is None else PurePosixPath(its.path or its.repo).stem


def located(given: Any, revision: str | None = None) -> Located:
    """The file that a user gave, fetched if it's on the hub. Raises PeftliteError, FileError."""
    path, name = as_path(given), Name.of(given)
    if name is None or path.exists():
        if revision is not None:
            raise PeftliteError(
                f"revision= is for what is on the hub, as 'org/name', and {short(given)} is a path"
            )
        return Located(path)
    if revision is not None:
        if name.revision not in (None, revision):
            raise PeftliteError(f"{given!r} names another revision than revision={revision!r}")
        name = name._replace(revision=revision)
    return _fetched(name, str(given))


def api(hub: Any) -> Any:
    """The hub's, or that of another in HF_ENDPOINT."""
    return hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


def _fetched(name: Name, given: str) -> Located:
    try:
        import huggingface_hub as hub
        import huggingface_hub.errors as errors
    except ImportError as error:
        raise FileError(
            f"there is no file {given!r}; to have it looked for on the hub: pip install "
            "'peftlite[hub]'"
        ) from error
    try:
        files, folder = _files(hub, errors, name)
        inside, wanted = _chosen(files, name)
        if folder is None:
            only = [*map(glob.escape, wanted)]
            folder = Path(
                api(hub).snapshot_download(name.repo, revision=name.revision, allow_patterns=only)
            )
    except FileError:
        raise
    except Exception as error:  # whatever huggingface_hub raises, and what is below it
        raise FileError(_missing(errors, name, given, error)) from error
    return Located(folder / inside, name._replace(revision=folder.name))


def _files(hub: Any, errors: Any, name: Name) -> tuple[list[str], Path | None]:
    """A repository's files; where there is no connection, those of the folder that keeps them."""
    try:
        its = api(hub).model_info(name.repo, revision=name.revision, timeout=10).siblings
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except Exception:  # of requests or of httpx, which have none in common
        with contextlib.suppress(FileNotFoundError):
            there: Any = {"local_files_only": True, "allow_patterns": []}  # however much of it
            kept = Path(hub.snapshot_download(name.repo, revision=name.revision, **there))
            files = [path for path in kept.rglob("*") if path.is_file()]
            return [path.relative_to(kept).as_posix() for path in files], kept
        raise
    return [file.rfilename for file in its or ()], None


def _chosen(files: Sequence[str], name: Name) -> tuple[str, list[str]]:
    """What is loaded of a repository, and the files that are fetched for it. Raises FileError."""
    if name.path in files and name.path.endswith(TENSORS):
        return name.path, [name.path]
    inside = f"{name.path}/" * bool(name.path)
    own = [file.removeprefix(inside) for file in files if file.startswith(inside)]
    own = [file for file in own if "/" not in file]
    tensors = [file for file in own if file.endswith(TENSORS)]
    if OURS in own or (len(tensors) == 1 and CONFIG not in own):
        file = inside + (OURS if OURS in own else tensors[0])
        return file, [file]
    adapter = [inside + file for file in own if _ADAPTER.fullmatch(file)]
    if CONFIG in own and any(map(_ADAPTER.fullmatch, tensors)):
        return name.path, adapter
    others = [f"{name.repo}/{file}" for file in files if file.endswith(TENSORS)]
    cure = (
        f"name one file, {listed(others)}"
        if others
        else f"pickles aren't fetched; type hf download {name.repo}, then peftlite convert"
    )
    raise FileError(
        f"{str(name)!r} on the hub is no delta by itself, having {listed(own) or 'nothing'}: {cure}"
    )


def _missing(errors: Any, name: Name, given: str, error: Exception) -> str:
    if isinstance(error, errors.GatedRepoError):
        return f"{name.repo!r} on the hub asks for your consent: give it there, then hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no file {given!r} here, and no repository {name.repo!r} on the hub (one "
            "that is private shows itself after hf auth login)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name.repo!r} on the hub has no revision {name.revision!r}"
    return (
        f"there is no file {given!r} here, and the hub can't be asked for it ({reason(error)}): go "
        "on with a connection, or give the path of a copy"
    )
