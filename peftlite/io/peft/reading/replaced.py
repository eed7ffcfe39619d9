"""Replaced: modules that peft saved as they were in the end, norms, and biases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from peftlite.core.patch import Method
from peftlite.core.site import keeps_statistics
from peftlite.errors import FileError
from peftlite.io.peft.folder import ALONE, LAYER, PROMPTS
from peftlite.io.peft.reading.adapter import Adapter, Claim, Left, difference, plain
from peftlite.io.peft.reading.copies import compared
from peftlite.methods.bitfit import BitFit
from peftlite.methods.full import FullTuning
from peftlite.methods.norm import NormTuning


def read_replaced(adapter: Adapter, left: Left) -> Iterator[Claim]:
    """The tensors of replaced modules, and biases, as changes of the base's."""
    biases = adapter.config.take("bias", "none", str) != "none"
    for rest, key in left.items():
        if ".original_module." in rest:
            continue  # a copy of the base's own
        if ".modules_to_save." in rest and rest.replace(".modules_to_save.", ".") in left:
            yield Claim({key: key})  # once more, with every bias: peft reads the other one
            continue
        address = plain(rest)
        if adapter.kind == ALONE and LAYER in rest:
            flat = len(adapter.file.entries[key].shape) == 1
            method = NormTuning() if flat else FullTuning()
            module, _, inner = address.partition(LAYER)
            if "." in inner and f"{module}.{inner}" not in adapter.sites:
                inner = inner.partition(".")[2]  # behind the adapter's name
            yield _change(adapter, key, method, f"{module}.{inner}", module)
        elif _replaced(adapter, address):
            _check_prompt(adapter, address)
            yield _change(adapter, key, FullTuning(), address)
        elif biases and "bias" in rest:
            flat = len(adapter.file.entries[key].shape) == 1
            yield _change(adapter, key, BitFit() if flat else FullTuning(), address)


def _replaced(adapter: Adapter, address: str) -> bool:
    """Whether the module of a tensor, or one that it's tied to, was saved as it was in the end."""
    site = adapter.sites.get(address)
    names = (address,) if site is None else site.names
    return any(adapter.replaces(name.rpartition(".")[0]) for name in names)


def _check_prompt(adapter: Adapter, address: str) -> None:
    """Raises FileError if it's of the embedding that a prompt goes before."""
    model: Any = adapter.model
    get = getattr(model, "get_input_embeddings", None)
    path = address.rpartition(".")[0]
    if adapter.kind in PROMPTS[:2] and get and adapter.modules.get(path) is get():
        raise FileError(
            f"{adapter.file.path!r} replaces {path}, and peft looks up the tokens behind a prompt "
            "in the base's own: leave it out of 'modules_to_save', and its tensors out of the file"
        )


def _change(adapter: Adapter, key: str, method: Method, address: str, module: str = "") -> Claim:
    """The difference of a tensor from the base's; of buffers, only statistics have one."""
    path, _, name = address.rpartition(".")
    site = adapter.sites.get(address)
    owner = adapter.modules.get(path)
    if site is None and owner is not None and (buffer := owner._buffers.get(name)) is not None:
        if keeps_statistics(owner):  # how many batches they are of changes no output
            return Claim({key: key}, module=module)
        return compared(adapter, key, buffer, module)
    if site is None:
        return Claim({key: key}, [(method, address)], module=module)

    def make(t: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{address}:difference": difference(key, t[key], site.whole)}

    return adapter.claim({key: key}, [(method, address)], make, module)
