"""Site: a place in a model, by address.

    layers.0.q.weight          a tensor
    layers.0.qkv.weight[0:64]  rows of it; [:, 0:64] columns; [q] [k] [v] thirds of the outputs
    layers.0.attn()            a call

One site holds every owner of a tied tensor, and every name of a shared module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import parametrize

from peftlite.core import maps
from peftlite.core.layout import Layout
from peftlite.core.tensors import Index, narrow, overlap, raw
from peftlite.errors import PeftliteError, TargetError
from peftlite.quant import others
from peftlite.table import short

CALL = "()"


@dataclass(frozen=True, eq=False, repr=False)
class Site:
    """A place in a model where a patch can sit.

    Args:
        address: its name, the first where it has several.
        names: every name, one per owner and per path to it.
        owners: every module that holds the tensor and the slot it's in; for a call, the module.
        index: the part of the tensor, as `(dim, start, stop)`; all of it if None.
        head: whether it belongs to the model's output head.
        on: the device to build a patch on; the tensor's own if None.
    """

    address: str
    names: tuple[str, ...]
    owners: tuple[tuple[nn.Module, str], ...]
    head: bool = False
    index: Index = None
    on: str | None = None

    def __repr__(self) -> str:
        return f"Site({self.address!r})"

    @property
    def module(self) -> nn.Module:
        """The first of its owners."""
        return self.owners[0][0]

    @property
    def slot(self) -> str:
        """The tensor's name in its module, or `()`."""
        return self.owners[0][1]

    @property
    def is_call(self) -> bool:
        """Whether it is a module's call, and no tensor."""
        return self.slot == CALL

    @property
    def whole(self) -> Tensor:
        """The base tensor, no patch applied: (o, i) for a linear map, and so on."""
        return raw(self.module, self.slot)

    @property
    def tensor(self) -> Tensor:
        """The part of the base tensor that the site names, no patch applied: (o, i) or a part."""
        return narrow(self.whole, self.index)

    @property
    def is_stored(self) -> bool:
        """Whether it is a tensor that its module holds, and doesn't compute."""
        return self.slot in self.module._parameters or self.is_statistic

    @property
    def is_statistic(self) -> bool:
        """Whether it is a mean or a variance that its module keeps, as BatchNorm does."""
        return self.slot in self.module._buffers

    @property
    def rides(self) -> bool:
        """Whether it is the whole weight of linear maps of vectors, alike in every owner."""
        kinds = {maps.kind_of(module) for module, _ in self.owners}
        return self.index is None and kinds in ({maps.Linear}, {maps.TransposedLinear})

    def overlaps(self, other: Site) -> bool:
        """Whether two sites of one tensor share entries."""
        return overlap(self.index, other.index)

    @property
    def layout(self) -> Layout:
        """How the tensor, or the part that the site names, is made of matrices."""
        return Layout.of(self.module, self.slot, self.shape, part=self.index is not None)

    @property
    def cuts_inputs(self) -> bool:
        """Whether it is a part of a matrix with some of the inputs, for all of the outputs."""
        return self.index is not None and self.index[0] == self.layout.dim(inputs=True)

    @property
    def shape(self) -> torch.Size:
        """Of the tensor, or of the part of it that the site names."""
        return self.tensor.shape

    @property
    def device(self) -> torch.device:
        """Where a patch for the site is built."""
        if self.on is not None:
            return torch.device(self.on)
        tensor = self._example()
        return torch.get_default_device() if tensor is None else tensor.device

    @property
    def parameter_dtype(self) -> torch.dtype:
        """What a patch keeps its parameters in: the tensor's dtype, fp32 where that is half."""
        tensor = self._example()
        dtype = torch.get_default_dtype() if tensor is None else tensor.dtype
        return dtype if dtype.itemsize >= 4 else torch.float32

    def _example(self) -> Tensor | None:
        """The site's tensor, or for a call some tensor of the module."""
        if not self.is_call:
            return self.whole
        return next((p for p in self.module.parameters() if p.is_floating_point()), None)

    @property
    def linear(self) -> bool:
        """Whether the tensor is the weight of a linear map that torch itself defines."""
        return maps.is_weight(self.module, self.slot)


def walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module of the base under every name it has; deltas and TorchScript left out.

    What torch's wrappers are around is there in their place.
    """
    if (inner := _wrapped(model)) is not None:
        yield from walk(inner, prefix)
        return
    yield prefix, model
    for name, child in model._modules.items():
        if child is not None and not isinstance(child, torch.jit.ScriptModule):
            yield from walk(child, f"{prefix}.{name}" if prefix else name)


WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper of torch's is around: torch.compile's, FSDP's, a checkpoint's, DDP's."""
    if not module._modules:
        return None
    names = ("module",) if isinstance(module, _PARALLEL) else WRAPPERS
    return next((module._modules[name] for name in names if name in module._modules), None)


def sites(model: nn.Module) -> list[Site]:
    """Every tensor and every call of a model, each once, in the order of registration."""
    if not isinstance(model, nn.Module):
        raise PeftliteError(f"the model comes first, a torch.nn.Module: not {short(model)}")
    if isinstance(model, torch.jit.ScriptModule):
        raise PeftliteError(
            "a TorchScript module can't be patched, since its code is compiled already: attach to "
            "the model before torch.jit.script or trace"
        )
    found: dict[Any, list[tuple[str, tuple[nn.Module, str]]]] = {}
    for path, module in walk(model):
        if isinstance(module, parametrize.ParametrizationList):
            continue  # its owner shows the tensor it makes
        dot = f"{path}." if path else ""
        found.setdefault((id(module), CALL), []).append((path + CALL, (module, CALL)))
        for slot in _slots(module):
            tensor = module._parameters.get(slot)
            if isinstance(tensor, UninitializedTensorMixin):
                raise PeftliteError(
                    f"{dot}{slot} is lazy and not yet initialised: run the model once on a batch, "
                    "then attach"
                )
            found.setdefault(_identity(module, slot), []).append((dot + slot, (module, slot)))
    head = output_head(model)
    return [
        Site(
            address=entries[0][0],
            names=tuple(name for name, _ in entries),
            owners=tuple(dict.fromkeys(owner for _, owner in entries)),
            head=head is not None and any(module is head for _, (module, _) in entries),
        )
        for entries in found.values()
    ]


def _identity(module: nn.Module, slot: str) -> Any:
    """What a tensor has in common with those it is tied to; a computed one is told by its slot."""
    tensor = module._parameters.get(slot)
    return (id(module), slot) if tensor is None else id(tensor)


def statistics(model: nn.Module) -> list[Site]:
    """The running means and variances of a model: no method takes them, but a file may."""
    found: dict[tuple[nn.Module, str], list[str]] = {}
    for path, module in walk(model):
        if keeps_statistics(module):
            for slot in ("running_mean", "running_var"):
                found.setdefault((module, slot), []).append(f"{path}.{slot}".lstrip("."))
    return [Site(names[0], tuple(names), (owner,)) for owner, names in found.items()]


def keeps_statistics(module: nn.Module) -> bool:
    """Whether training moves a mean and a variance that the module keeps, as BatchNorm does."""
    buffers = module._buffers
    known = buffers.get("running_mean") is not None and buffers.get("running_var") is not None
    return known and not module._modules


def _slots(module: nn.Module) -> list[str]:
    made = list(module.parametrizations) if parametrize.is_parametrized(module) else []
    theirs = others.hidden(module)
    shown = [n for n, p in module._parameters.items() if p is not None and n not in theirs]
    return (["weight"] if theirs else []) + shown + made


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes the model's outputs.

    It is what `get_output_embeddings()` gives where the model has that, and otherwise the linear
    map registered last, unless it is inside a numbered block or the only one there is.
    """
    get_head: Any = getattr(model, "get_output_embeddings", None)
    if get_head is not None:
        try:
            head = get_head()
        except NotImplementedError:
            head = None
        if head is not None:
            return head
    linear = [(path, module) for path, module in walk(model) if maps.is_linear(module)]
    weights = {
        _identity(module, slot)
        for _, module in walk(model)
        for slot in _slots(module)
        if maps.is_weight(module, slot)
    }
    if not linear or len(weights) < 2:
        return None
    path, last = linear[-1]
    *parents, _ = path.split(".")
    return None if any(part.isdigit() for part in parents) else last


def locate(
    everything: Sequence[Site], addresses: Iterable[str]
) -> tuple[dict[str, Site], list[str]]:
    """The sites at literal addresses, and the addresses where there is none."""
    by_name = {name: site for site in everything for name in site.names}
    found, missing = {}, []
    for address in addresses:
        text, part = split_index(address)
        site = by_name.get(text)
        if site is None or (part is not None and site.is_call):
            missing.append(address)
        else:
            found[address] = site if part is None else slice_of(site, part)
    return found, missing


def split_index(pattern: str) -> tuple[str, str | None]:
    found = re.fullmatch(r"(.*)\[([^\[\]]+)\]", pattern)
    return (found[1], found[2]) if found else (pattern, None)


def slice_of(site: Site, part: str) -> Site:
    """A part of a tensor, from what stands in the brackets."""
    shape = site.whole.shape
    if part in ("q", "k", "v"):
        dim = site.layout.dim(inputs=False)
        third, rest = divmod(shape[dim], 3)
        if rest:
            raise TargetError(
                f"{site.address} has {shape[dim]} outputs, which is no three equal parts; "
                "give the rows: [0:64]"
            )
        start = "qkv".index(part) * third
        index = (dim, start, start + third)
    else:
        found = re.fullmatch(r"\s*(:\s*,)?\s*(\d*)\s*:\s*(\d*)\s*", part)
        dim = 1 if found and found[1] else 0
        if not found or dim >= len(shape) or (dim == 1 and len(shape) != 2):
            raise TargetError(
                f"[{part}] is no part of {site.address} of shape {tuple(shape)}; give rows as "
                "[0:64], columns of a matrix as [:, 0:64], or [q], [k], [v]"
            )
        index = (dim, int(found[2] or 0), int(found[3] or shape[dim]))
    dim, start, stop = index
    if not 0 <= start < stop <= shape[dim]:
        whole = f"[0:{shape[0]}]" if dim == 0 else f"[:, 0:{shape[1]}]"
        raise TargetError(
            f"[{part}] is empty or beyond {site.address} of shape {tuple(shape)}: it is {whole}"
        )
    suffix = f"[{start}:{stop}]" if dim == 0 else f"[:, {start}:{stop}]"
    names = tuple(name + suffix for name in site.names)
    return replace(site, address=site.address + suffix, names=names, index=index)


def whole_address(address: str) -> str:
    """The address of the tensor that a part is of."""
    return split_index(address)[0]
