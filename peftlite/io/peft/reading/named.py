"""Named: whether the file has tensors of every module that its settings name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from peftlite.core import maps
from peftlite.core.maps import kind_of
from peftlite.errors import FileError
from peftlite.io.peft.config import Config, ends
from peftlite.io.peft.folder import CLASSIFIER, CONFIG, TOKENS
from peftlite.io.peft.reading.adapter import Adapter, Claim, never_run
from peftlite.table import listed


def check_named(adapter: Adapter, claims: Sequence[Claim]) -> None:
    """Raises FileError if a module that the settings name has no tensors."""
    # each by its first name
    paths = [*{id(m): path for path, m in reversed([*adapter.modules.items()])}.values()]
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
    names = _names(config, "target_modules")
    if isinstance(names, str) and names.lower() == "all-linear":
        names = [*_linear(adapter)]
    tying = config.flag("ensure_weight_tying")
    for path in filter(None, paths):
        site = adapter.sites.get(f"{path}.weight")
        tied = tying and site is not None and len(site.owners) > 1
        if path in changed or tied or adapter.replaces(path):
            continue
        if _among(config, "exclude_modules", _names(config, "exclude_modules"), path):
            continue
        if _among(config, "target_modules", names, path) and (
            path in names or isinstance(names, str) or _in_layers(config, path)
        ):
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


def _names(config: Config, setting: str) -> Any:
    """The names in a setting, or its regex."""
    if isinstance(config.data.get(setting), str):
        return config.take(setting, "", str)
    return config.names(setting)


def _among(config: Config, setting: str, names: Any, path: str) -> bool:
    """Whether names, or a regex, are of a module, as peft sees it."""
    if isinstance(names, str):
        return bool(names) and config.matches(setting, names, path)
    return any(ends(path, name) for name in names)


def _in_layers(config: Config, path: str) -> bool:
    """Whether a module is in the numbered layers that the settings say; all, if they say none."""
    layers = config.take("layers_to_transform", [], list, int)
    if layers == []:
        return True
    named = _names(config, "layers_pattern")
    patterns = [named] if isinstance(named, str) else named
    starts = [rf"(?:^|.*?\.){pattern}" for pattern in patterns if pattern]
    for start in starts or [r".*?\.[^.]*"]:
        for number in re.finditer(r"\.(\d+)(?=\.)", path):
            if config.matches("layers_pattern", start, path[: number.start()]):
                return int(number[1]) in (layers if isinstance(layers, list) else [layers])
    return False


def _linear(adapter: Adapter) -> Iterator[str]:
    """The modules that peft takes for "all-linear"."""
    model: Any = adapter.model
    pretrained = any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)
    out = model.get_output_embeddings() if pretrained else None
    if pretrained and out is None and adapter.config.data.get("task_type") == "SEQ_CLS":
        out = next((its for name in CLASSIFIER if (its := getattr(model, name, None))), None)
    for path, module in adapter.modules.items():
        linear = isinstance(module, nn.Linear) or kind_of(module) is maps.TransposedLinear
        if linear and module is not out:
            yield path
