"""Modules: those that a method has tensors of, each translated by the method's form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from peftlite.core.patch import Method
from peftlite.core.site import CALL, Site
from peftlite.errors import FileError
from peftlite.io.peft.config import ends
from peftlite.io.peft.form import Form, Layer
from peftlite.io.peft.forms import FORMS
from peftlite.io.peft.reading.adapter import Adapter, Claim, Left, never_run, plain


def read_modules(adapter: Adapter, left: Left) -> Iterator[Claim]:
    """The modules that the adapter's own method has tensors of, and what is for all of them."""
    form = FORMS.get(adapter.kind)
    if form is None:
        return
    claims = [_module(adapter, form, path, keys) for path, keys in _by_module(form, left).items()]
    yield from claims
    placed = [pair for claim in claims for pair in claim.placed]
    if adapter.model is not None and placed:
        yield from _shared(adapter, form, left, placed)


def _by_module(form: Form, left: Left) -> dict[str, dict[str, str]]:
    """A form's keys by the path of a module, and by what the tensor is called there."""
    found: dict[str, dict[str, str]] = {}
    for rest, key in left.items():
        name = next((name for name, _ in form.names if rest.endswith(f".{name}")), None)
        if name is not None:
            found.setdefault(rest.removesuffix(f".{name}"), {})[name] = key
    return found


def _module(adapter: Adapter, form: Form, path: str, keys: Mapping[str, str]) -> Claim:
    t = adapter.meta(keys)
    layer = _layer(adapter, path, t)
    if layer.site is not None and (what := form.forgotten(layer.site)):
        raise FileError(
            f"{adapter.file.path!r} changes {layer.path}, which peft's {adapter.kind} runs without "
            f"its {what}, as no change of a weight does; what peft merges, if it can, is another "
            "change, which pl.extract takes from the merged model"
        )
    method = form.method(adapter.config, layer, t)
    if method is None or (never_run(adapter, layer.path) and not layer.inner):
        return Claim(keys, module=plain(path))
    if layer.site is None:
        address = path if adapter.model is None else f"{path}.weight"
        return Claim(keys, [(method, address)], module=plain(path))

    def address_of(slot: str) -> str:
        return f"{layer.path}{slot}" if slot.startswith(CALL) else f"{layer.path}.{slot}"

    def make(t: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = [its.items() for _, its in form.parts(method, dict(t), layer)]
        return {address_of(own): x for its in parts for own, x in its if x is not None}

    parts = form.parts(method, t, layer)  # which takes what it uses out of t
    placed = [(how, address_of(own.partition(":")[0])) for how, its in parts for own in its]
    used = {name: key for name, key in keys.items() if name not in t}
    return adapter.claim(used, placed, make, module=plain(path))


def _shared(
    adapter: Adapter, form: Form, left: Left, placed: Sequence[tuple[Method, str]]
) -> Iterator[Claim]:
    """The tensors that are for all modules, which the first of them has here."""
    method = placed[0][0]
    addresses = [*dict.fromkeys(address for how, address in placed if how == method)]
    sites = [replace(adapter.seen(a), on="cpu") for a in addresses if a in adapter.sites]
    if len(sites) < len(addresses):
        return

    def make(t: dict[str, Tensor]) -> dict[str, Tensor]:
        made = form.read_shared(method, sites, list(t.values()))
        return {f"{addresses[0]}:{name}": x for name, x in made.items()}

    keys = {key: key for name in form.shared if (key := f"base_model.{name}") in left}
    yield adapter.claim(keys, [], make)
    make(adapter.values(keys))  # looks at them


def _is_old(adapter: Adapter, site: Site, t: Mapping[str, Tensor]) -> bool:
    """Whether a stack's factors are as before peft 0.19; what peft converted keeps its version."""
    a, shape = t.get("lora_A.weight"), site.whole.shape
    if not adapter.config.before(0, 19) or a is None or len(shape) != 3:
        return False
    if shape[1] != shape[2]:
        return a.shape[-1] == shape[1]
    # which peft writes for what was two maps and is one
    patterns = adapter.config.take("rank_pattern", {}, dict)
    return not any(key.startswith(r".*\.") for key in patterns)


def _layer(adapter: Adapter, path: str, t: Mapping[str, Tensor]) -> Layer:
    """The module at a path, and the site that is changed there."""
    inner = path
    while inner.endswith(".base_layer"):
        inner = inner.removesuffix(".base_layer")
    depth = (len(path) - len(inner)) // len(".base_layer")
    last = inner.endswith(".base_layer.out_proj")
    inner = plain(inner)
    chosen = _parameters(adapter, inner)
    if depth < len(chosen):  # the last of a module's parameters is outermost
        site = chosen[-1 - depth]
        return Layer(inner, site, by_name=True, old=_is_old(adapter, site, t))
    path = inner + ".base_layer" * depth
    slots = (f"{path}.in_proj_weight", f"{path}.weight")
    site = next((adapter.seen(address) for address in slots if address in adapter.sites), None)
    blocks = adapter.config.take("use_bdlora", {}, dict).get("nblocks", 1)
    orthogonal = adapter.kind == "HRA" and adapter.config.flag("apply_GS")
    inside = last and never_run(adapter, path)
    return Layer(path, site, inner=inside, blocks=blocks, orthogonal=orthogonal)


def _parameters(adapter: Adapter, path: str) -> list[Site]:
    """The parameters of a module that peft was given by name."""
    names = adapter.config.names("target_parameters")
    module = adapter.modules.get(path)
    own = [f"{path}.{slot}" for slot in (module._parameters if names and module else ())]
    named = [address for address in own if any(ends(address, name) for name in names)]
    return [adapter.sites[address] for address in named if address in adapter.sites]
