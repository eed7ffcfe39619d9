"""Targets: the modules that PEFT's settings name, as peft finds them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from peftlite.core import maps
from peftlite.core.maps import kind_of
from peftlite.io.peft.config import Config, ends
from peftlite.io.peft.folder import CLASSIFIER


def targeted(
    config: Config, model: Any, modules: Mapping[str, nn.Module], paths: Iterable[str]
) -> Iterator[str]:
    """Those of paths that target_modules names, but for modules that are copied as a whole."""
    names = _names(config, "target_modules")
    excluded = _names(config, "exclude_modules")
    if isinstance(names, str) and names.lower() == "all-linear":
        names = [*_linear(config, model, modules)]
    for path in filter(None, paths):
        if replaced(config, path) or _among(config, "exclude_modules", excluded, path):
            continue
        if _among(config, "target_modules", names, path) and (
            path in names or isinstance(names, str) or _in_layers(config, path)
        ):
            yield path


def first_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """The paths of modules, of one that has several its first."""
    return [*{id(m): path for path, m in reversed([*modules.items()])}.values()][::-1]


def replaced(config: Config, path: str) -> bool:
    """Whether modules_to_save names a module, or one around it."""
    return any(f"{name}." in f"{path}." for name in config.names("modules_to_save"))


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


def _linear(config: Config, model: Any, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The modules that peft takes for "all-linear"."""
    pretrained = any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)
    out = model.get_output_embeddings() if pretrained else None
    if pretrained and out is None and config.data.get("task_type") == "SEQ_CLS":
        out = next((its for name in CLASSIFIER if (its := getattr(model, name, None))), None)
    for path, module in modules.items():
        linear = isinstance(module, nn.Linear) or kind_of(module) is maps.TransposedLinear
        if linear and module is not out:
            yield path
