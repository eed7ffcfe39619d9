"""PEFT's methods: what each is called there, its settings, and its tensors at one module.

A `Form` translates one method, both ways. Its functions of tensors are run without values first,
for the shapes that come of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite import maps
from peftlite.errors import FileError, PeftliteError
from peftlite.maps import kind_of
from peftlite.methods.adalora import AdaLoRA
from peftlite.methods.bitfit import BitFit
from peftlite.methods.boft import BOFT
from peftlite.methods.dora import DoRA, DoRAPatch
from peftlite.methods.fourier import FourierFT
from peftlite.methods.hra import HRA
from peftlite.methods.ia3 import IA3
from peftlite.methods.loha import LoHa
from peftlite.methods.lokr import LoKr
from peftlite.methods.lora import LoRA
from peftlite.methods.oft import OFT, skew
from peftlite.methods.shira import SHiRA
from peftlite.methods.vblora import VBLoRA
from peftlite.methods.vera import VeRA
from peftlite.patch import Method
from peftlite.site import Site
from peftlite.table import shown

Tensors = dict[str, Tensor]
Parts = list[tuple[Method, dict[str, Tensor | None]]]

# what says where an adapter comes from, where its tensors sit, or how it is trained: the tensors
# themselves say where they sit, and their shapes the rank
HARMLESS = frozenset(
    """peft_type peft_version auto_mapping base_model_name_or_path revision task_type
    inference_mode target_modules exclude_modules layers_to_transform layers_pattern
    fan_in_fan_out ensure_weight_tying r rank_pattern n_frequency n_frequency_pattern init_r
    init_weights init_lora_weights init_ia3_weights init_logits_std init_vector_bank_bound
    loftq_config eva_config corda_config lora_ga_config velora_config megatron_core
    qalora_group_size rank_dropout rank_dropout_scale module_dropout vera_dropout vblora_dropout
    boft_dropout boft_block_size boft_block_num boft_n_butterfly_factor oft_block_size
    num_vectors vector_length mask_type random_seed use_effective_conv2d""".split()
)


_PATTERNS = {
    "r": "rank_pattern", "lora_alpha": "alpha_pattern", "alpha": "alpha_pattern",
    "n_frequency": "n_frequency_pattern",
}  # fmt: skip


class Config:
    """An adapter's settings: plain data, each looked at before it is believed."""

    def __init__(self, data: dict[str, Any], at: str):
        self.data, self.at = data, at
        self._taken = set(HARMLESS)

    def take(self, name: str, default: Any, *kinds: type) -> Any:
        """A setting of the kinds given, or else the default where it is left out or null."""
        self._taken.add(name)
        value = self.data.get(name)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise FileError(f"{self.at!r} has {name!r} as {shown(value)}")
        if isinstance(value, int | float) and not abs(value) <= 1e9:
            raise FileError(f"{self.at!r} has {name!r} as {value}, which no training has")
        return value

    def number(self, name: str, default: float) -> float:
        return self.take(name, default, int, float)

    def flag(self, name: str, default: bool = False) -> bool:
        return self.take(name, default, bool)

    def names(self, name: str) -> list[str]:
        """A list of the ends of paths."""
        found = self.take(name, [], list)
        if not all(isinstance(entry, str) for entry in found):
            raise FileError(f"{self.at!r} has {name!r} as {shown(found)}")
        return found

    def patterned(self, name: str, path: str, default: float) -> float:
        """A number that some modules have for themselves, by the end of their path."""
        table = Config(self.take(name, {}, dict), self.at)
        for key in table.data:
            # a regex in peft; of those, an escaped and anchored path is what a list may hold
            end = key.removeprefix("^").removesuffix("$").replace("\\", "")
            if set(end) & set("*+?|()[]{}^$"):
                raise FileError(
                    f"{self.at!r} has a regex in {name!r}, {key!r}: write out the modules' paths"
                )
            if ends(path, end):
                return table.number(key, default)
        return default

    def finish(self) -> None:
        """Raises FileError if there are settings that may change the model in an unknown way."""
        unknown = {k: v for k, v in self.data.items() if k not in self._taken and v}
        for name, value in unknown.items():
            raise FileError(
                f"{self.at!r} is a {self.data['peft_type']} with {name!r} as {shown(value)}, "
                "which may change the model in a way that peftlite doesn't have"
            )


def ends(path: str, end: str) -> bool:
    """Whether a path is, or ends in, dotted words."""
    return path == end or path.endswith(f".{end}")


@dataclass(frozen=True)
class At:
    """One module of an adapter, by its path, and the site that it changes there.

    `site` is None without a model, or where the model has no such module.
    """

    path: str
    site: Any = None

    @property
    def stacked(self) -> bool:
        """Whether it's a parameter that peft takes by its own name, not by its layer's."""
        site = self.site
        if site is None or isinstance(site.module, nn.MultiheadAttention):
            return site is not None and site.slot != "in_proj_weight"
        return site.slot != "weight" or kind_of(site.module) is None

    @property
    def inner(self) -> bool:
        """Whether it's the last map of an attention, which peft changes with the first."""
        its = nn.modules.linear.NonDynamicallyQuantizableLinear
        return self.site is not None and isinstance(self.site.module, its)

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

    kinds: ClassVar[tuple[type[Method], ...]]
    names: ClassVar[tuple[tuple[str, str], ...]]
    """peft's names of the tensors at a module, with ours."""
    layers: ClassVar[tuple[type[maps.Map], ...]] = (maps.Linear,)
    convs: ClassVar[tuple[int, ...]] = ()
    """The layers that peft takes, and of how many dimensions convolutions may be."""
    shared: ClassVar[tuple[str, ...]] = ()
    """The tensors that are for all modules."""
    bias: ClassVar[str | None] = None
    """What `bias=` says where the biases of its modules are trained."""

    def method(self, config: Config, at: At, t: Tensors) -> Any:
        """Ours, from the settings and the shapes of peft's tensors; None if it changes nothing."""
        raise NotImplementedError

    def settings(self, method: Any, patch: Any) -> dict[str, Any]:
        """peft's settings, from a method and a patch."""
        raise NotImplementedError

    def joined(self, settings: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """One table of settings from those of modules by name. Raises PeftliteError."""
        first = next(iter(settings.values()))
        found = dict(first)
        for name in first:
            own = {at: its[name] for at, its in settings.items() if its[name] != first[name]}
            if own and name in _PATTERNS:
                found[_PATTERNS[name]] = {f"^{re.escape(at)}": x for at, x in own.items()}
            elif own and name != "lora_dropout":  # which is for training
                raise PeftliteError(
                    f"peft has one {name} for all modules, and this delta has {shown(first[name])} "
                    f"and {shown(next(iter(own.values())))}: attach what differs as another delta"
                )
        return found

    def ours(self, t: Tensors, at: At) -> Tensors:
        """Our tensors from peft's, which are taken out of `t`."""
        return {own: t.pop(name) for name, own in self.names if name in t}

    def theirs(self, patch: Any, at: At) -> Tensors:
        own = patch.saved()
        return {name: own[key] for name, key in self.names if key in own}

    def parts(self, method: Any, t: Tensors, at: At) -> Parts:
        """Our tensors as `slot:name`, and what they are of; None for one that another site has."""
        own = self.ours(t, at)
        return [(method, {f"{at.site.slot}:{name}": x for name, x in own.items()})]

    def taken(self, site: Site) -> bool:
        """Whether peft takes a site."""
        kind = kind_of(site.module)
        dims = site.whole.dim() - 2 if kind is maps.Conv else 0
        return site.slot == "weight" and (kind in self.layers or dims in self.convs)

    def write_shared(self, patches: Sequence[Any]) -> list[Tensor]:
        """The tensors for all modules."""
        return []

    def read_shared(self, method: Any, sites: Sequence[Site], t: Sequence[Tensor]) -> Tensors:
        """Ours of them, as the first site has them. Raises ValueError if they can't be."""
        return {}


class LoRAForm(Form):
    kinds = (LoRA, DoRA)
    names = (
        ("lora_A.weight", "a"), ("lora_embedding_A", "a"), ("lora_B.weight", "b"),
        ("lora_embedding_B", "b"), ("lora_magnitude_vector", "m"), ("lora_B.bias", ""),
    )  # fmt: skip
    layers = (maps.Linear, maps.TransposedLinear, maps.Embedding)
    convs = (1, 2, 3)
    bias = "lora_only"

    def method(self, config: Config, at: At, t: Tensors) -> LoRA:
        a = t["lora_embedding_A" if "lora_embedding_A" in t else "lora_A.weight"]
        init = config.take("init_lora_weights", True, bool, str)
        if init not in (True, False, "gaussian", "eva", "orthogonal", "pissa", "olora"):
            raise FileError(
                f"{config.at!r} has 'init_lora_weights' as {init!r}, whose base isn't the model's "
                "own: save it with path_initial_model_for_weight_conversion= in peft"
            )
        rank = config.patterned("rank_pattern", at.path, config.number("r", 8))
        kind = DoRA if config.flag("use_dora") else LoRA
        config.flag("lora_bias")  # whose tensors say so
        return kind(
            rank=int(rank) if at.stacked else len(a),
            alpha=config.patterned("alpha_pattern", at.path, config.number("lora_alpha", 8)),
            dropout=config.number("lora_dropout", 0.0),
            scaling="rslora" if config.flag("use_rslora") else "alpha/r",
            init=init if init in ("pissa", "olora") else "kaiming",
        )

    def settings(self, method: LoRA, patch: Any) -> dict[str, Any]:
        r = patch.factors()[0].shape[-2]
        rslora = method.scaling == "rslora"
        alpha = method.scale * (math.sqrt(r) if rslora else r)
        # what is a whole number but for the rounding of a root is one
        alpha = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
        return {
            "r": r, "lora_alpha": alpha, "lora_dropout": method.dropout,
            "use_rslora": rslora, "use_dora": isinstance(method, DoRA),
        }  # fmt: skip

    def _keys(self, at: At) -> tuple[str, str]:
        embeds = kind_of(at.site.module) is maps.Embedding
        kind = "lora_embedding_{}" if embeds else "lora_{}.weight"
        return kind.format("A"), kind.format("B")

    def ours(self, t: Tensors, at: At) -> Tensors:
        a, b = (t.pop(key) for key in self._keys(at))
        whole, ones = at.site.whole, at.ones
        if ones:
            a, b = fit(a, -1, *whole.shape[1:]).flatten(1), fit(b, -1, -1, *ones).flatten(1)
        elif at.stacked and whole.dim() == 3:
            e = len(whole)
            a, b = a.unflatten(0, (e, -1)), b.unflatten(1, (-1, e)).permute(2, 0, 1)
            if getattr(at.site.module, "is_transposed", False):
                a, b = b.mT, a.mT
        found = {"a": a, "b": b}
        if "lora_magnitude_vector" in t:
            m = t.pop("lora_magnitude_vector")
            found["m"] = fit(m, 1, -1, *ones).flatten() if ones else m
        return found

    def parts(self, method: LoRA, t: Tensors, at: At) -> Parts:
        bias = t.pop("lora_B.bias", None)
        on_meta = all(x.is_meta for x in t.values())
        found = super().parts(method, t, at)
        if method.init != "kaiming":
            found[0][1].update(self._start(method, at.site, on_meta))
        if bias is not None:
            found.append(added_bias(at.site.module, method.scale * bias))
        return found

    @torch.no_grad()
    def _start(self, method: LoRA, site: Site, on_meta: bool) -> Tensors:
        """B₀A₀, which peft takes out of the base: what the base's own weights give."""
        patch = method.build(replace(site, on="meta" if on_meta else None))
        if not on_meta:
            patch.reset(site.tensor)
        return {f"{site.slot}:{name}": getattr(patch, name) for name in ("a0", "b0")}

    def theirs(self, patch: Any, at: At) -> Tensors:
        a, b = (x.detach() for x in patch.factors())
        module, ones = at.site.module, at.ones
        if ones:
            a, b = a.reshape(-1, *at.site.shape[1:]), b.reshape(*b.shape, *ones)
        elif a.dim() == 3:
            if getattr(module, "is_transposed", False):
                a, b = b.mT, a.mT
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        found = dict(zip(self._keys(at), (a, b), strict=True))
        if isinstance(patch, DoRAPatch):
            m = patch.m.detach()
            found["lora_magnitude_vector"] = m.reshape(1, -1, *ones) if ones else m
        return found

    def taken(self, site: Site) -> bool:
        module, inner = site.module, nn.modules.linear.NonDynamicallyQuantizableLinear
        if isinstance(module, nn.modules.conv._ConvNd):
            # in peft the change of a grouped one sees the inputs of all groups
            return super().taken(site) and module.groups == 1
        if isinstance(module, nn.MultiheadAttention | inner):
            return site.slot in ("in_proj_weight", "weight")
        return super().taken(site) or site.tensor.dim() in (2, 3)


def added_bias(module: nn.Module, d: Tensor) -> tuple[Method, dict[str, Tensor | None]]:
    """A change of a layer's bias, or the bias that it lacks."""
    if getattr(module, "bias", None) is not None:
        return BitFit(), {"bias:difference": d}
    return BitFit(add_missing=True), {"():d": d}


class IA3Form(Form):
    kinds = (IA3,)
    names = (("ia3_l", "l"),)
    layers = (maps.Linear, maps.TransposedLinear)
    convs = (2, 3)

    def method(self, config: Config, at: At, t: Tensors) -> IA3:
        shape, named = t["ia3_l"].shape, config.take("feedforward_modules", [], list, str)
        if isinstance(named, str) and len(shape) > 2:
            raise FileError(
                f"{config.at!r} has a regex for 'feedforward_modules': write out the modules' paths"
            )
        inputs = any(ends(at.path, name) for name in config.names("feedforward_modules")) if (
            isinstance(named, list)
        ) else shape[0] == 1  # fmt: skip
        return IA3(feedforward=inputs)

    def settings(self, method: IA3, patch: Any) -> dict[str, Any]:
        return {"feedforward": method.feedforward}

    def joined(self, settings: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        inputs = sorted(at for at, its in settings.items() if its["feedforward"])
        return {"feedforward_modules": inputs}

    def parts(self, method: IA3, t: Tensors, at: At) -> Parts:
        scale, inputs, ones = t.pop("ia3_l"), method.feedforward, at.ones
        shape = (1, -1, *ones) if ones or inputs else (-1, 1)
        found: dict[str, Tensor | None] = {"weight:l": fit(scale, *shape).flatten()}
        if not inputs and at.site.module.bias is not None:
            found["bias:l"] = None
        return [(method, found)]

    def theirs(self, patch: Any, at: At) -> Tensors:
        scale, ones = patch.l.detach(), at.ones
        return {"ia3_l": scale.reshape(1, -1, *ones) if ones or patch.inputs else scale[:, None]}


class LoHaForm(Form):
    kinds = (LoHa,)
    names = tuple((f"hada_w{k}_{x}", f"w{k}{x}") for k in (1, 2) for x in "ab")
    convs = (1, 2)

    def method(self, config: Config, at: At, t: Tensors) -> LoHa:
        alpha = config.patterned("alpha_pattern", at.path, config.number("alpha", 8))
        return LoHa(rank=len(t["hada_w1_b"]), alpha=alpha)

    def settings(self, method: LoHa, patch: Any) -> dict[str, Any]:
        return {"r": method.rank, "alpha": method.scale * method.rank}


_MIXED_UP = "{} is a Conv1d, the taps of whose lokr_w2 peft mixes up, unless it's of a low rank"


class LoKrForm(Form):
    kinds = (LoKr,)
    names = tuple((f"lokr_w{k}{x}", f"w{k}{x[1:]}") for k in (1, 2) for x in ("", "_a", "_b"))
    convs = (1, 2)

    def method(self, config: Config, at: At, t: Tensors) -> LoKr:
        factor = config.number("decompose_factor", -1)
        return LoKr(
            rank=int(config.patterned("rank_pattern", at.path, config.number("r", 8))),
            alpha=config.patterned("alpha_pattern", at.path, config.number("alpha", 8)),
            factor=None if factor == -1 else int(factor),
            decompose_both=config.flag("decompose_both"),
        )

    def settings(self, method: LoKr, patch: Any) -> dict[str, Any]:
        return {
            "r": method.rank, "alpha": method.scale * method.rank,
            "decompose_factor": method.factor or -1, "decompose_both": method.decompose_both,
        }  # fmt: skip

    def ours(self, t: Tensors, at: At) -> Tensors:
        found = super().ours(t, at)
        if at.taps and "w2" in found:
            if len(at.taps) == 1:
                raise ValueError(_MIXED_UP.format(at.path))
            found["w2"] = fit(found["w2"], -1, -1, *at.taps).flatten(1)
        return found

    def theirs(self, patch: Any, at: At) -> Tensors:
        found = super().theirs(patch, at)
        if at.taps and "lokr_w2" in found:
            if len(at.taps) == 1:
                raise PeftliteError(f"{_MIXED_UP.format(at.path)}: attach with a smaller rank")
            w2 = found["lokr_w2"]
            found["lokr_w2"] = w2.reshape(len(w2), -1, *at.taps)
        return found


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])


class OFTForm(Form):
    kinds = (OFT,)
    names = (("oft_R.weight", "q"),)
    convs = (2,)
    bias = "oft_only"

    def method(self, config: Config, at: At, t: Tensors) -> OFT:
        terms = config.number("num_cayley_neumann_terms", 5)
        neumann = config.flag("use_cayley_neumann", True)
        if neumann and terms < 3:
            raise FileError(f"{config.at!r} has 'num_cayley_neumann_terms' as {terms}: below 3")
        if neumann and _release(config.take("peft_version", "", str)) < (0, 18):
            raise FileError(
                f"{config.at!r} is of a peft before 0.18, whose 'use_cayley_neumann' was another "
                "series: train it anew"
            )
        eps = config.number("eps", 6e-5)
        return OFT(
            block_size=(1 + math.isqrt(1 + 8 * t["oft_R.weight"].shape[-1])) // 2,
            neumann_terms=max(int(terms), 4) - 2 if neumann else None,
            eps=eps if config.flag("coft") else None,
        )

    def settings(self, method: OFT, patch: Any) -> dict[str, Any]:
        neumann = method.neumann_terms
        if neumann == 1:
            raise PeftliteError("peft has no OFT with neumann_terms=1, but from 2 up, and exact")
        return {
            "r": 0, "oft_block_size": patch.block, "use_cayley_neumann": neumann is not None,
            **({"num_cayley_neumann_terms": neumann + 2} if neumann else {}),
            **({"coft": True, "eps": method.eps} if method.eps else {}),
        }  # fmt: skip

    def parts(self, method: OFT, t: Tensors, at: At) -> Parts:
        # peft's series turns the other way than its exact map
        q = t.pop("oft_R.weight")
        return [(method, {"weight:q": q if method.neumann_terms is None else -q})]

    def theirs(self, patch: Any, at: At) -> Tensors:
        q = patch.q.detach()
        return {"oft_R.weight": q if patch.terms is None else -q}


class BOFTForm(Form):
    kinds = (BOFT,)
    names = (("boft_R", "q"), ("boft_s", "s"))
    convs = (2,)
    bias = "boft_only"

    def method(self, config: Config, at: At, t: Tensors) -> BOFT:
        m, _, block, _ = t["boft_R"].shape
        return BOFT(block_size=block, m=m)

    def settings(self, method: BOFT, patch: Any) -> dict[str, Any]:
        return {
            "boft_block_size": patch.block, "boft_block_num": 0,
            "boft_n_butterfly_factor": method.m,
        }  # fmt: skip

    def ours(self, t: Tensors, at: At) -> Tensors:
        whole, s = t.pop("boft_R"), t.pop("boft_s")
        s = fit(s, *((1, -1) if at.ones else (-1, 1))).flatten()
        row, column = torch.triu_indices(whole.shape[-2], whole.shape[-1], 1).to(whole.device)
        # peft learns a whole matrix for each skew one
        return {"q": ((whole - whole.mT) / 2)[..., row, column], "s": s}

    def theirs(self, patch: Any, at: At) -> Tensors:
        s = patch.s.detach()
        return {
            "boft_R": skew(patch.q.detach(), patch.block),
            "boft_s": s[None] if at.ones else s[:, None],
        }


class HRAForm(Form):
    kinds = (HRA,)
    names = (("hra_u", "u"),)
    convs = (2,)
    bias = "hra_only"

    def method(self, config: Config, at: At, t: Tensors) -> HRA:
        return HRA(rank=t["hra_u"].shape[-1])

    def settings(self, method: HRA, patch: Any) -> dict[str, Any]:
        return {"r": method.rank}

    def ours(self, t: Tensors, at: At) -> Tensors:
        return {"u": t.pop("hra_u").mT}

    def theirs(self, patch: Any, at: At) -> Tensors:
        return {"hra_u": patch.u.detach().mT}


class VeRAForm(Form):
    kinds = (VeRA,)
    names = (("vera_lambda_b", "b"), ("vera_lambda_d", "d"))
    layers = (maps.Linear, maps.TransposedLinear)
    shared = ("vera_A", "vera_B")
    bias = "vera_only"

    def method(self, config: Config, at: At, t: Tensors) -> VeRA:
        config.flag("save_projection")
        seed = config.take("projection_prng_key", 0, int)
        initial = config.number("d_initial", 0.1)
        return VeRA(rank=len(t["vera_lambda_d"]), seed=seed, d_initial=initial)

    def settings(self, method: VeRA, patch: Any) -> dict[str, Any]:
        return {
            "r": method.rank, "projection_prng_key": method.seed, "d_initial": method.d_initial,
            "save_projection": True,
        }  # fmt: skip

    def write_shared(self, patches: Sequence[Any]) -> list[Tensor]:
        projection = patches[0].projection
        if len({patch.projection.shapes for patch in patches}) > 1:
            raise PeftliteError(
                "peft has one random A and B for all of a VeRA, and this delta has several of "
                "different sizes: attach it as one method"
            )
        return [projection.a, projection.b]

    def read_shared(self, method: VeRA, sites: Sequence[Site], t: Sequence[Tensor]) -> Tensors:
        if t and not t[0].is_meta:
            drawn = self.write_shared(method.build_all(sites))
            for mine, theirs in zip(drawn, t, strict=True):
                if not torch.equal(mine.cpu().to(theirs.dtype), theirs):
                    raise ValueError(
                        "its vera_A or vera_B isn't what its projection_prng_key gives for these "
                        "modules"
                    )
        return {}


class VBLoRAForm(Form):
    kinds = (VBLoRA,)
    names = tuple(
        (f"vblora_logits_{x.upper()}{end}", f"{own}_{x}")
        for x in "ab"
        for end, own in (("", "logits"), ("_topk_weights", "logits"), ("_topk_indices", "indices"))
    )
    layers = (maps.Linear, maps.TransposedLinear)
    shared = ("vblora_vector_bank",)
    bias = "vblora_only"

    def method(self, config: Config, at: At, t: Tensors) -> VBLoRA:
        compact = config.flag("save_only_topk_weights")
        a = t["vblora_logits_A_topk_indices" if compact else "vblora_logits_A"]
        return VBLoRA(
            rank=len(a),
            num_vectors=int(config.number("num_vectors", 256)),
            vector_length=int(config.number("vector_length", 256)),
            topk=int(config.number("topk", 2)),
            save_only_topk_weights=compact,
        )

    def settings(self, method: VBLoRA, patch: Any) -> dict[str, Any]:
        h, b = patch.bank.vectors.shape
        return {
            "r": method.rank, "num_vectors": h, "vector_length": b, "topk": method.topk,
            "save_only_topk_weights": method.save_only_topk_weights,
        }  # fmt: skip

    def ours(self, t: Tensors, at: At) -> Tensors:
        found = {}
        for name, own in self.names:
            if name in t:
                x = t.pop(name)
                if name.endswith("weights"):  # of the k that are chosen, all but the last
                    x = torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1)
                    x = x.clamp_min(torch.finfo(x.dtype).tiny).log()
                    x = x[..., 1:] - x[..., :1]
                found[own] = x.transpose(0, 1) if own.endswith("b") else x
        return found

    def theirs(self, patch: Any, at: At) -> Tensors:
        own, found = patch.saved(), {}
        for x in "ab":
            name, logits = f"vblora_logits_{x.upper()}", own[f"logits_{x}"].detach()
            if f"indices_{x}" in own:
                found[f"{name}_topk_indices"] = own[f"indices_{x}"]
                logits = F.pad(logits, (1, 0)).softmax(-1)[..., :-1]
                name += "_topk_weights"
            found[name] = logits
        return {name: y.transpose(0, 1) if "_B" in name else y for name, y in found.items()}

    def write_shared(self, patches: Sequence[Any]) -> list[Tensor]:
        banks = {id(patch.bank): patch.bank.vectors for patch in patches}
        if len(banks) > 1:
            raise PeftliteError(
                "peft has one bank for all of a VB-LoRA, and this delta has several: attach it as "
                "one method"
            )
        return [bank.detach() for bank in banks.values()]

    def read_shared(self, method: VBLoRA, sites: Sequence[Site], t: Sequence[Tensor]) -> Tensors:
        return dict(zip(("bank.vectors",), t, strict=False))


class FourierFTForm(Form):
    kinds = (FourierFT,)
    names = (("fourierft_spectrum", "c"),)
    layers = (maps.Linear, maps.TransposedLinear)
    bias = "fourier_only"

    def method(self, config: Config, at: At, t: Tensors) -> FourierFT:
        return FourierFT(
            n=len(t["fourierft_spectrum"]),
            alpha=config.number("scaling", 150.0),
            seed=config.take("random_loc_seed", 777, int),
        )

    def settings(self, method: FourierFT, patch: Any) -> dict[str, Any]:
        return {"n_frequency": patch.n, "scaling": method.alpha, "random_loc_seed": method.seed}


class AdaLoRAForm(Form):
    kinds = (AdaLoRA,)
    names = (("lora_A", "q"), ("lora_B", "p"), ("lora_E", "lam"))
    layers = (maps.Linear, maps.TransposedLinear)
    bias = "lora_only"

    def method(self, config: Config, at: At, t: Tensors) -> AdaLoRA | None:
        rank, first = len(t["lora_A"]), config.number("init_r", 12)
        config.number("lora_alpha", 8)
        if not rank:  # all of it was cut
            return None
        warmup, last = (int(config.number(name, 0)) for name in ("tinit", "tfinal"))
        steps = int(config.number("total_step", 0))
        return AdaLoRA(
            total_steps=max(steps, warmup + last + 1),
            init_rank=rank,
            target_rank=min(rank, int(config.number("target_r", 8))),
            t_init=warmup,
            t_final=last,
            delta_t=int(config.number("deltaT", 1)),
            beta1=config.number("beta1", 0.85),
            beta2=config.number("beta2", 0.85),
            orth_reg_weight=config.number("orth_reg_weight", 0.5),
            # peft divides by the rank at first, and a little more
            alpha=config.number("lora_alpha", 8) / (first + 1e-5) * rank,
            dropout=config.number("lora_dropout", 0.0),
        )

    def settings(self, method: AdaLoRA, patch: Any) -> dict[str, Any]:
        r = method.init_rank
        return {
            "r": r, "init_r": r, "target_r": method.target_rank, "tinit": method.t_init,
            "tfinal": method.t_final, "deltaT": method.delta_t, "beta1": method.beta1,
            "beta2": method.beta2, "orth_reg_weight": method.orth_reg_weight,
            "total_step": method.total_steps, "lora_alpha": float(f"{method.scale:.12g}"),
            "lora_dropout": method.dropout,
        }  # fmt: skip

    def joined(self, settings: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        # of smaller ranks are modules that were cut: peft still divides by the rank at first
        ranks = {at: its["r"] for at, its in settings.items()}
        r = max(ranks.values())
        same = {"r": r, "init_r": r, "target_r": min(its["target_r"] for its in settings.values())}
        found = super().joined({at: {**its, **same} for at, its in settings.items()})
        cut = {f"{at}.lora_E": [k < n for k in range(r)] for at, n in ranks.items() if n < r}
        found["rank_pattern"] = cut or None
        del found["r"]
        if "alpha_pattern" in found:
            raise PeftliteError("peft has one lora_alpha for all modules of an AdaLoRA")
        return {**found, "lora_alpha": found["lora_alpha"] * (r + 1e-5)}

    def ours(self, t: Tensors, at: At) -> Tensors:
        found = super().ours(t, at)
        return {**found, "lam": fit(found["lam"], -1, 1)[:, 0]}

    def theirs(self, patch: Any, at: At) -> Tensors:
        found = super().theirs(patch, at)
        return {**found, "lora_E": found["lora_E"][:, None]}


class SHiRAForm(Form):
    kinds = (SHiRA,)
    names = (("shira_weight", "values"), ("shira_indices", "indices"))

    def method(self, config: Config, at: At, t: Tensors) -> SHiRA:
        return SHiRA(rank=int(config.number("r", 32)))

    def settings(self, method: SHiRA, patch: Any) -> dict[str, Any]:
        return {"r": method.rank}

    def ours(self, t: Tensors, at: At) -> Tensors:
        values, (row, column) = t.pop("shira_weight"), t.pop("shira_indices").long()
        if values.is_meta:
            return {"values": values, "indices": row.int()}
        rows, columns = at.site.shape
        entries, order = (row * columns + column).sort()
        inside = ((row >= 0) & (row < rows) & (column >= 0) & (column < columns)).all()
        if not inside or (entries[1:] == entries[:-1]).any():
            raise ValueError("its shira_indices are beyond the weight, or name an entry twice")
        return {"values": values[order], "indices": entries.int()}

    def theirs(self, patch: Any, at: At) -> Tensors:
        indices, columns = patch.indices.long(), at.site.shape[1]
        pairs = torch.stack([indices // columns, indices % columns]).int()
        return {"shira_weight": patch.values.detach(), "shira_indices": pairs}


class BEFTForm(Form):
    kinds = ()
    names = (("beft_bias", "difference"),)

    def method(self, config: Config, at: At, t: Tensors) -> BitFit:
        return BitFit()

    def parts(self, method: BitFit, t: Tensors, at: At) -> Parts:
        d = t.pop("beft_bias")
        return [added_bias(at.site.module, fit(d, 1, -1)[0])]


FORMS: dict[str, Form] = {
    "LORA": LoRAForm(), "IA3": IA3Form(), "LOHA": LoHaForm(), "LOKR": LoKrForm(), "OFT": OFTForm(),
    "BOFT": BOFTForm(), "HRA": HRAForm(), "VERA": VeRAForm(), "VBLORA": VBLoRAForm(),
    "FOURIERFT": FourierFTForm(), "ADALORA": AdaLoRAForm(), "SHIRA": SHiRAForm(),
    "BEFT": BEFTForm(),
}  # fmt: skip
