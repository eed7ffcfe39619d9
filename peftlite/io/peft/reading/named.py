"""Named: whether the file has tensors of every module that its settings name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peftlite.errors import FileError
from peftlite.io.peft.config import ends
from peftlite.io.peft.folder import CONFIG, TOKENS
from peftlite.io.peft.reading.adapter import Adapter, Claim, never_run
from peftlite.io.peft.targets import first_names, targeted
from peftlite.table import listed


def check_named(adapter: Adapter, claims: Sequence[Claim]) -> None:
    """Raises FileError if a module that the settings name has no tensors."""
    paths = first_names(adapter.modules)
    lost = [
        *_not_replaced(adapter, paths, claims),
        *_not_changed(adapter, paths, claims),
        *_not_given(adapter, paths, claims),
        *_not_shifted(adapter, paths, claims),
    ]
    if lost:
        raise FileError(
            f"{adapter.file.path!r} lacks the tensors of {len(lost)} modules that {CONFIG} "
            f"names: {listed(lost)}"
        )
    if adapter.config.data.get("trainable_token_indices") and not any(
        TOKENS in key for claim in claims for key in claim.keys.values()
    ):
        raise FileError(
            f"{adapter.file.path!r} lacks the rows of tokens that {CONFIG} has in "
            "'trainable_token_indices'"
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
    config, changed = adapter.config, {claim.module for claim in claims}
    tying = config.flag("ensure_weight_tying")
    for path in targeted(config, adapter.model, adapter.modules, paths):
        site = adapter.sites.get(f"{path}.weight")
        tied = tying and site is not None and len(site.owners) > 1
        if not (path in changed or tied):
            yield path


def _not_given(adapter: Adapter, paths: Sequence[str], claims: Sequence[Claim]) -> Iterator[str]:
    """The parameters that target_parameters names and the file has no tensor of."""
    names = adapter.config.names("target_parameters")
    given = {address for claim in claims for _, address in claim.placed}
    for path in filter(None, paths if names else ()):
        if never_run(adapter, path):
            continue
        for slot in adapter.modules[path]._parameters:
            address = f"{path}.{slot}"
            named = any(ends(address, name) for name in names)
            if named and address in adapter.sites and address not in given:
                yield address


def _not_shifted(adapter: Adapter, paths: Sequence[str], claims: Sequence[Claim]) -> Iterator[str]:
    """The biases that `bias` names, all or the adapter's own, and the file has no tensor of."""
    said = adapter.config.data.get("bias") or "none"
    changed = {claim.module for claim in claims}
    given = {address for claim in claims for _, address in claim.placed}
    if said == "all":
        named = {address for address in adapter.sites if f".{address}".endswith(".bias")}
        sites = {adapter.sites[address] for address in given & adapter.sites.keys()}
        yield from sorted(address for address in named if adapter.sites[address] not in sites)
    for path in paths if said not in ("none", "all") else ():
        inner = f"{path}.out_proj" if never_run(adapter, f"{path}.out_proj") else path
        address = f"{inner}.bias"
        if path in changed and address in adapter.sites and address not in given:
            yield address
