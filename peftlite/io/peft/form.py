"""Form: what a method of ours is in PEFT: its name there, its settings, its tensors at a module.

It translates both ways. Its functions of tensors are run without values first, for the shapes that
come of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from peftlite.core import maps
from peftlite.core.maps import kind_of
from peftlite.core.patch import Method
from peftlite.core.site import Site
from peftlite.errors import FileError, PeftliteError
from peftlite.io.peft.config import Config
from peftlite.table import short

Tensors = dict[str, Tensor]
Parts = list[tuple[Method, dict[str, Tensor | None]]]

_PATTERNS = {
    "r": "rank_pattern", "lora_alpha": "alpha_pattern", "alpha": "alpha_pattern",
    "n_frequency": "n_frequency_pattern",
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One module of an adapter, by its path, and the site that it changes there.

    Args:
        site: None without a model, or where the model has no such module.
        by_name: whether `target_parameters` names it, in a file that is read.
        inner: whether it's the last map of an attention, which peft changes with the first.
        turned: whether it's an output head with an embedding's weight, and so with its change.
        old: whether a stack's factors are as they were before peft 0.19.
        blocks: of how many blocks a factor may be that is saved as those alone (BD-LoRA).
        expert: whether it's of one expert, which has a site with the others.
        orthogonal: whether HRA's vectors are made orthogonal before they reflect.
    """

    path: str
    site: Any = None
    by_name: bool = False
    inner: bool = False
    turned: bool = False
    old: bool = False
    blocks: int = 1
    expert: bool = False
    orthogonal: bool = False

    @property
    def stacked(self) -> bool:
        """Whether it's a parameter that peft takes by its own name, not by its layer's."""
        site = self.site
        if self.by_name or site is None:
            return self.by_name
        if isinstance(site.module, nn.MultiheadAttention):
            return site.slot != "in_proj_weight"
        return site.slot != "weight" or not (kind_of(site.module) or embeds(site.module))

    @property
    def name(self) -> str:
        """What peft's settings call it."""
        if self.inner:
            return self.path.rpartition(".")[0]
        return f"{self.path}.{self.site.slot}" if self.stacked else self.path

    @property
    def taps(self) -> tuple[int, ...]:
        """The size of a convolution's kernel."""
        return self.site.module.kernel_size if kind_of(self.site.module) is maps.Conv else ()

    @property
    def ones(self) -> list[int]:
        return [1] * len(self.taps)


def embeds(module: nn.Module) -> bool:
    """Whether peft has a module's rows as an embedding's: plain, or scaled by a number it knows."""
    scaled = isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")
    return kind_of(module) is maps.Embedding or (scaled and not module.max_norm)


def is_tied_embedding(model: Any, module: Any) -> bool:
    """Whether a module is the input embedding of a model of transformers that ties others to it.

    Of these, peft changes a row for all once it is said for the embedding.
    """
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    return bool(tied) and module is model.get_input_embeddings()


def size_of(t: Tensors, *names: str, dim: int = 0) -> int | None:
    """A size of the tensor that has one of these names; None where there are none yet."""
    return t[next((n for n in names if n in t), names[0])].shape[dim] if t else None


def agreed(config: Config, layer: Layer, name: str, says: float, found: float | None) -> int:
    """A size of a module's tensors, which has to be what a setting says. Raises FileError."""
    if found is None:
        return cast(int, says)  # the method looks at it
    if (layer.site is not None or layer.expert) and says != found:
        raise FileError(
            f"{config.path!r} has {name!r} as {says:g} for {layer.name}, and the tensors there "
            f"have {found:g}: they aren't of one adapter, so save it again"
        )
    return int(found)


def rank_of(config: Config, layer: Layer, found: float | None, default: int = 8) -> int:
    """The rank of a module's tensors, which has to be that of the settings. Raises FileError."""
    says = config.patterned("rank_pattern", layer.name, config.number("r", default))
    return agreed(config, layer, "r", says, found)


def flagged(config: Config, layer: Layer, name: str, tensor: str, t: Tensors) -> bool:
    """A setting that says whether a module has a tensor, and has to be right. Raises FileError."""
    says = config.take(name, False, bool, dict)
    flag = says is True or isinstance(says, dict)
    if t and flag is not (tensor in t):
        raise FileError(
            f"{config.path!r} has {name!r} as {short(says)}, and {layer.path} has "
            f"{'no' if flag else 'a'} {tensor}: they aren't of one adapter, so save it again"
        )
    return flag


def fit(tensor: Tensor, *shape: int) -> Tensor:
    """A tensor of this very shape, -1 for any size. Raises ValueError."""
    if len(shape) != tensor.dim() or any(
        n not in (-1, m) for n, m in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ", ".join("any" if n == -1 else str(n) for n in shape)
        raise ValueError(f"one is {tuple(tensor.shape)}, not ({wanted})")
    return tensor


class Form:
    """A method in peft; by default its tensors are ours under other names."""

    type: ClassVar[str]
    """peft's name of the method."""
    kinds: ClassVar[tuple[type[Method], ...]]
    names: ClassVar[tuple[tuple[str, str], ...]]
    """peft's names of the tensors at a module, with ours."""
    layers: ClassVar[tuple[type[maps.Map], ...]] = (maps.Linear,)
    convs: ClassVar[tuple[int, ...]] = ()
    """The layers that peft takes, and of how many dimensions convolutions may be."""
    forgets: ClassVar[tuple[str, ...]] = ("padding_mode",)
    """What of a convolution peft goes without while it runs, though not once it has merged."""
    shared: ClassVar[tuple[str, ...]] = ()
    """The tensors that are for all modules."""
    bias: ClassVar[str | None] = None
    """What `bias=` says where the biases of its modules are trained."""

    def method(self, config: Config, layer: Layer, t: Tensors) -> Any:
        """Ours, from the settings and the shapes of peft's tensors; None if it changes nothing.

        Without tensors it is an adapter that begins, whose sizes the settings alone say.
        """
        raise NotImplementedError

    def settings(self, method: Any, patch: Any) -> dict[str, Any]:
        """peft's settings, from a method and a patch."""
        raise NotImplementedError

    def joined(self, settings: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """One table of settings from those of modules by name. Raises PeftliteError."""
        first = next(iter(settings.values()))
        found = dict(first)
        for name in first:
            own = {path: its[name] for path, its in settings.items() if its[name] != first[name]}
            if own and name in _PATTERNS:
                found[_PATTERNS[name]] = {f"^{re.escape(path)}": x for path, x in own.items()}
            elif own and name != "lora_dropout":  # which is for training
                raise PeftliteError(
                    f"peft has one {name} for all modules, and this delta has {short(first[name])} "
                    f"and {short(next(iter(own.values())))}: attach what differs as another delta"
                )
        return found

    def ours(self, t: Tensors, layer: Layer) -> Tensors:
        """Our tensors from peft's, which are taken out of `t`."""
        return {own: t.pop(name) for name, own in self.names if name in t}

    def theirs(self, patch: Any, layer: Layer) -> Tensors:
        own = patch.saved()
        return {name: own[key] for name, key in self.names if key in own}

    def parts(self, method: Any, t: Tensors, layer: Layer) -> Parts:
        """Our tensors as `slot:name`, and what they are of; None for one that another site has."""
        own = self.ours(t, layer)
        return [(method, {f"{layer.site.slot}:{name}": x for name, x in own.items()})]

    def taken(self, site: Site) -> bool:
        """Whether peft takes a site."""
        kind = kind_of(site.module)
        dims = site.whole.dim() - 2 if kind is maps.Conv else 0
        return site.slot == "weight" and (kind in self.layers or dims in self.convs)

    def forgotten(self, site: Site) -> str | None:
        """What peft runs a convolution without, as no change of its weight does."""
        module: Any = site.module
        # a checkpoint's stand-in has no padding, and doesn't run
        if kind_of(module) is not maps.Conv or not hasattr(module, "padding"):
            return None
        n, padded = site.whole.dim() - 2, any(module._reversed_padding_repeated_twice)
        plain = {
            "padding_mode": "zeros" if padded else module.padding_mode, "groups": 1,
            "dilation": (1,) * n, "kernel_size": (1,) * n,
            "stride": module.stride[:1] * n, "padding": module.padding[:1] * n,
        }  # fmt: skip
        lost = (name for name in self.forgets if getattr(module, name) != plain[name])
        return next((f"{name}={getattr(module, name)!r}" for name in lost), None)

    def write_shared(self, patches: Sequence[Any]) -> list[Tensor]:
        """The tensors for all modules."""
        return []

    def read_shared(self, method: Any, sites: Sequence[Site], t: Sequence[Tensor]) -> Tensors:
        """Ours of them, as the first site has them. Raises ValueError if they can't be."""
        return {}
