"""push: a delta to a repository on the hub, as one commit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from peftlite.core.delta import Delta
from peftlite.core.find import given_delta
from peftlite.errors import FileError, PeftliteError, reason
from peftlite.fields import check_given
from peftlite.io.export import export
from peftlite.io.hub import OURS, Name, api
from peftlite.io.native import save
from peftlite.table import short

Form = Literal["peftlite", "peft"]


def push(
    delta: Delta | str,
    name: str,
    format: Form = "peftlite",
    *,
    model: nn.Module | None = None,
    private: bool = True,
    message: str | None = None,
) -> str:
    """Writes a delta into a repository on the hub, and gives the name that `load` reads it by.

    That name, ORG/NAME[/PATH]@COMMIT, is of this very commit, whatever is pushed later. In the
    repository, or in the folder PATH of it, "peftlite" is delta.safetensors, as `save` writes it,
    and "peft" what `export` writes. Needs huggingface_hub, and what `hf auth login` keeps.

    Args:
        delta: a delta, or its name in `model`.
        name: ORG/NAME, or ORG/NAME/PATH.
        private: whether a repository that isn't there yet is to be private.
        message: the commit's.

    Raises:
        FileError: the hub can't be reached, or doesn't let you.
        PeftliteError: the name can't be one, or PEFT has nothing that is this delta.

    Example:
        delta = pl.attach(nn.Linear(4, 2), pl.LoRA(rank=2), name="sql")
        try:
            pinned = pl.push(delta, "my-org/sql")
        except pl.FileError as error:  # no connection, or nobody who may write there
            print(error)
    """
    delta, to = given_delta("push", delta, model), Name.of(name)
    check_given("format", format, get_args(Form))
    if to is None or to.revision is not None:
        raise PeftliteError(
            f"push takes the name of a repository, as 'org/name' or 'org/name/folder': not "
            f"{short(name)}"
        )
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise PeftliteError("push needs huggingface_hub: pip install 'peftlite[hub]'") from error
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "delta"
        if format == "peft":
            export(delta, made, "peft")
        else:
            made.mkdir()
            save(delta, made / OURS)
        commit = _uploaded(hub, made, to, private, message or f"{delta.name}, by peftlite")
    return str(to._replace(revision=commit))


def _uploaded(hub: Any, folder: Path, to: Name, private: bool, message: str) -> str:
    """The commit that puts a folder's files into a repository. Raises FileError."""
    try:
        api(hub).create_repo(to.repo, private=private, exist_ok=True)
        commit = api(hub).upload_folder(
            repo_id=to.repo, folder_path=folder, path_in_repo=to.path, commit_message=message
        )
        return commit.oid
    except Exception as error:  # whatever huggingface_hub raises, and what is below it
        raise FileError(
            f"can't push to {to.repo!r}: {reason(error)}; who may write there types hf auth login "
            "first"
        ) from error
