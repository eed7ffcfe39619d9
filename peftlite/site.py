"""Site: a place in a model, by address, and the language that picks sites (`targets`).

    layers.0.q.weight          a tensor
    layers.0.qkv.weight[0:64]  rows of it; [:, 0:64] columns; [q] [k] [v] thirds of the outputs
    layers.0.attn()            a call

One site holds every owner of a tied tensor, and every name of a shared module.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import parametrize

from peftlite import maps
from peftlite.errors import PeftliteError, TargetError
from peftlite.table import few, shown

Pattern = "str | re.Pattern[str] | Callable[[Site], bool]"
Targets = Any  # Pattern | Sequence[Pattern] | None

CALL = "()"


@dataclass(frozen=True, eq=False)
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
    index: tuple[int, int, int] | None = None
    on: str | None = None

    @property
    def module(self) -> nn.Module:
        return self.owners[0][0]

    @property
    def slot(self) -> str:
        """The tensor's name in its module, or `()`."""
        return self.owners[0][1]

    @property
    def is_call(self) -> bool:
        return self.slot == CALL

    @property
    def whole(self) -> Tensor:
        """The base tensor, no patch applied."""
        return raw(self.module, self.slot)

    @property
    def tensor(self) -> Tensor:
        """The part of the base tensor that the site names, no patch applied."""
        if self.index is None:
            return self.whole
        dim, start, stop = self.index
        return self.whole.narrow(dim, start, stop - start)

    def overlaps(self, other: Site) -> bool:
        """Whether two sites of one tensor share entries."""
        if self.index is None or other.index is None:
            return True
        (dim, start, stop), (also, begin, end) = self.index, other.index
        return dim != also or (start < end and begin < stop)

    @property
    def shape(self) -> torch.Size:
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
    def transposed(self) -> bool:
        """Whether the tensor's first dimension is the input of a linear map, not the output."""
        return self.slot == "weight" and maps.is_transposed(self.module)

    @property
    def linear(self) -> bool:
        """Whether the tensor is the weight of a linear map that torch itself defines."""
        return maps.is_weight(self.module, self.slot)


def raw(module: nn.Module, slot: str) -> Tensor:
    """The tensor in a slot as the base has it, patched or not, parametrized or not."""
    tensor = module._parameters.get(slot)
    if tensor is None:  # made by a parametrization, or by a hook of the older kind
        made = parametrize.is_parametrized(module, slot)
        tensor = module.parametrizations[slot]() if made else getattr(module, slot)
    return tensor


def walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module of the base under every name it has; deltas and TorchScript left out."""
    yield prefix, model
    for name, child in model._modules.items():
        if child is not None and not isinstance(child, torch.jit.ScriptModule):
            yield from walk(child, f"{prefix}.{name}" if prefix else name)


def sites(model: nn.Module) -> list[Site]:
    """Every tensor and every call of a model, each once, in the order of registration."""
    if not isinstance(model, nn.Module):
        raise PeftliteError(f"the model comes first, a torch.nn.Module: not {shown(model)}")
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
            key = (id(module), slot) if tensor is None else id(tensor)
            found.setdefault(key, []).append((dot + slot, (module, slot)))
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


def _slots(module: nn.Module) -> list[str]:
    made = list(module.parametrizations) if parametrize.is_parametrized(module) else []
    return [name for name, p in module._parameters.items() if p is not None] + made


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes the model's outputs.

    It is what `get_output_embeddings()` gives where the model has that, and otherwise the linear
    map registered last, unless it is inside a numbered block or the only one there is.
    """
    if hasattr(model, "get_output_embeddings"):
        try:
            head = model.get_output_embeddings()
        except NotImplementedError:
            head = None
        if head is not None:
            return head
    linear = [(path, module) for path, module in walk(model) if maps.is_linear(module)]
    weights = {
        id(raw(module, slot))
        for _, module in walk(model)
        for slot in _slots(module)
        if maps.is_weight(module, slot)
    }
    if not linear or len(weights) < 2:
        return None
    path, last = linear[-1]
    *parents, _ = path.split(".")
    return None if any(part.isdigit() for part in parents) else last


def select(
    everything: Sequence[Site], targets: Targets, exclude: Targets, method: Any
) -> list[tuple[Site, bool]]:
    """The sites a method takes, and whether each was asked for by a target.

    Raises TargetError if a pattern matches nothing, or nothing that the method can take.
    """
    left_out = {s.address for p in _patterns(exclude) for s in _excluded(everything, p)}
    if targets is None:
        picked = {s.address: (s, False) for s in everything if _try(s) and method.default(s)}
        if not picked:
            raise TargetError(
                f"{type(method).__name__} takes none of this model's tensors by default; "
                + _examples(everything, "name some with targets=, such as")
            )
    else:
        patterns = _patterns(targets)
        if not patterns:
            raise TargetError("targets is empty; leave it out for the method's own choice")
        picked = {s.address: (s, True) for p in patterns for s in _matches(everything, p, method)}
    chosen = [pair for pair in picked.values() if not {*_addresses(pair[0])} & left_out]
    if not chosen:
        raise TargetError(f"exclude={exclude!r} leaves {type(method).__name__} no site to take")
    whole = {where.address for where, _ in chosen}
    if parts := [a for a in left_out if whole_address(a) != a and whole_address(a) in whole]:
        raise TargetError(
            f"exclude names {parts[0]}, a part of a tensor that is taken whole: name the parts to "
            "take with targets="
        )
    return chosen


def _addresses(site: Site) -> tuple[str, str]:
    return site.address, whole_address(site.address)


def _excluded(everything: Sequence[Site], pattern: Any) -> list[Site]:
    try:
        return _matches(everything, pattern, None)
    except TargetError as error:
        raise TargetError(f"in exclude: {error}") from error


def locate(model: nn.Module, addresses: Iterable[str]) -> tuple[dict[str, Site], list[str]]:
    """The sites at literal addresses, and the addresses where there is none."""
    by_name = {name: site for site in sites(model) for name in site.names}
    found, missing = {}, []
    for address in addresses:
        text, part = _split_index(address)
        site = by_name.get(text)
        if site is None or (part is not None and site.is_call):
            missing.append(address)
        else:
            found[address] = site if part is None else _slice(site, part)
    return found, missing


def _patterns(targets: Targets) -> list[Any]:
    if targets is None:
        return []
    return list(targets) if isinstance(targets, list | tuple | set | frozenset) else [targets]


def _matches(everything: Sequence[Site], pattern: Any, method: Any | None) -> list[Site]:
    """The sites that one pattern names; `method` says which of a module's it takes, None all."""

    def takes(site: Site) -> bool:
        return method is None or (_try(site) and method.accepts(site))

    if not isinstance(pattern, str | re.Pattern):
        found = [site for site in everything if takes(site) and _holds(pattern, site)]
        if not found:
            offered = [site.address for site in everything if takes(site)]
            raise TargetError(
                f"the predicate {shown(pattern)} is true for none of the {len(offered)} sites "
                f"offered to it: {few(offered)}"
            )
        return found
    text, part = (pattern, None) if isinstance(pattern, re.Pattern) else _split_index(pattern)
    literal = isinstance(text, str) and "*" not in text
    if text == "":
        raise TargetError("an empty string names nothing; leave targets out for the default")
    whole = literal and any(text in (*s.names, *_modules_above(s)) for s in everything)
    matches = _matcher(text, whole)
    found, refused = [], []
    for site in everything:
        by_address = any(map(matches, site.names))
        around = _modules_above(site, every=method is None)
        if not by_address and not any(map(matches, around)):
            continue
        # an address spelled out is taken at its word: the method's `build` may refuse it
        wanted = takes(site) or (by_address and literal)
        (found if wanted else refused).append(site)
    if found and part is not None:
        found = [_slice(site, part) for site in found if not site.is_call]
    if not found and refused:
        raise TargetError(
            f"{_show(pattern)} matches {few(s.address for s in refused)}; but "
            f"{type(method).__name__} takes {method.takes}"
        )
    if not found:
        raise TargetError(f"{_show(pattern)} matches nothing; {_hint(everything, text)}")
    return found


def _matcher(text: Any, whole: bool) -> Callable[[str], bool]:
    """What a pattern says of a path; cached, since sites share their modules.

    Words that are no whole path (`whole`) are the end of one.
    """
    if isinstance(text, re.Pattern):
        regex = text
    else:
        start = "" if "*" in text or (whole and "." in text) else r"(.*\.)?"
        regex = re.compile(start + ".*".join(map(re.escape, text.split("*"))))
    return functools.cache(lambda path: regex.fullmatch(path) is not None)


def _modules_above(site: Site, every: bool = False) -> Iterator[str]:
    """The modules whose naming takes the site: for a call its own, for a tensor all around it."""
    for name in site.names:
        path = name
        if site.is_call:
            path = name.removesuffix(CALL)
            yield path
        while "." in path and (every or not site.is_call):
            path = path.rpartition(".")[0]
            yield path


def _split_index(pattern: str) -> tuple[str, str | None]:
    found = re.fullmatch(r"(.*)\[([^\[\]]+)\]", pattern)
    return (found[1], found[2]) if found else (pattern, None)


def _slice(site: Site, part: str) -> Site:
    """A part of a tensor, from what stands in the brackets."""
    shape = site.whole.shape
    if part in ("q", "k", "v"):
        dim = 1 if site.transposed else 0
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
    return _split_index(address)[0]


def _try(site: Site) -> bool:
    """Whether a method may be offered the site unless it's spelled out: floats and calls."""
    return site.is_call or site.whole.is_floating_point()


def _holds(predicate: Any, site: Site) -> bool:
    """What a predicate says of a site."""
    if isinstance(predicate, type | nn.Module) or not callable(predicate):
        raise TargetError(
            f"{shown(predicate)} is no target: give an address such as {site.address!r}, a "
            "compiled regex, a predicate such as lambda site: isinstance(site.module, nn.Linear), "
            "or a list of these"
        )
    try:
        return bool(predicate(site))
    except Exception as error:
        raise TargetError(
            f"the predicate {shown(predicate)} failed at {site.address}: {error!r}; it is given a "
            "site, with its .address, .module and .shape"
        ) from error


def nearest(model: nn.Module, address: str) -> str:
    """The addresses of a model that are nearest to one it lacks."""
    return _hint(sites(model), address)


def _show(pattern: Any) -> str:
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)


def _examples(everything: Sequence[Site], introduction: str) -> str:
    """Some addresses to type."""
    found = [repr(s.address) for s in everything if not s.is_call][:3]
    return f"{introduction} {', '.join(found)}" if found else "the model has no parameters"


def _hint(everything: Sequence[Site], text: Any) -> str:
    """The addresses nearest to what was asked, as something to type."""
    if isinstance(text, re.Pattern):
        return _examples(everything, "a regex has to match a whole path, such as")
    if text in ("all-linear", "all_linear"):
        return "leave targets out for the weights of all linear maps but the head's"
    if re.search(r"[\\()|^$+?]", text.removesuffix(CALL)):
        return "for a regex, pass re.compile(...)"
    names = {n for s in everything for n in s.names} | {
        path for s in everything for path in _modules_above(s) if path
    }
    words = {piece.lower(): piece for n in names for piece in (n, n.rpartition(".")[2])}
    near = difflib.get_close_matches(text.strip("*.").lower(), sorted(words), n=4, cutoff=0.5)
    if not near:
        return _examples(everything, "there are such as")
    return f"nearest: {', '.join(repr(words[word]) for word in near)}"
