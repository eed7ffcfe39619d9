"""Named: whether the file has tensors of every module that its settings name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peftlite.errors import FileError
from peftlite.io.peft.config import ends
from peftlite.io.peft.folder import CONFIG
from peftlite.io.peft.reading.adapter import Adapter, Claim
from peftlite.table import listed


def check_named(adapter: Adapter, claims: Sequence[Claim]) -> None:
    """Raises FileError if a module that the settings name has no tensors."""
    # each by its first name
    paths = [*{id(m): path for path, m in reversed([*adapter.modules.items()])}.values()]
    lost = [*_not_replaced(adapter, paths, claims), *_not_changed(adapter, paths, claims)]
    if lost:
        raise FileError(
            f"{adapter.file.path!r} lacks the tensors of {len(lost)} modules that {CONFIG} "
            f"names: {listed(lost)}"
        )


def _not_replaced(adapter: Adapter, paths: Sequence[str], claims: Sequence[Claim]) -> Iterator[str]:
    """The modules, by tensor, that modules_to_save names and the file has no tensor of."""
    given = {address for claim in claims for _, address in claim.placed}
    for path in filter(adapter.replaces, paths):
        for slot in adapter.modules[path]._parameters:
            address = f"{path}.{slot}"
            if address in adapter.sites and address not in given:
                yield path


def _not_changed(adapter: Adapter, paths: Sequence[str], claims: Sequence[Claim]) -> Iterator[str]:
    """The modules that target_modules names and the file has no tensor of."""
    data, changed = adapter.config.data, {claim.module for claim in claims}
    names, some = data.get("target_modules"), ("exclude_modules", "layers_to_transform")
    if not isinstance(names, list) or any(map(data.get, some)):
        return
    for name in names:
        its = [name] if name in paths else [path for path in paths if ends(path, str(name))]
        yield from (p for p in its if p not in changed and not adapter.replaces(p))
