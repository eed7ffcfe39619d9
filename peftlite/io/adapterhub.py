"""AdapterHub's folders, as adapters' save_adapter leaves them: methods of its own, and heads.

A key is a module's path, what is kept there, the adapter's name, and a parameter's:
`bert.encoder.layer.0.attention.self.query.loras.NAME.lora_A`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftlite.core.patch import Method
from peftlite.core.site import CALL, Site
from peftlite.errors import FileError
from peftlite.io import prefixes, reft
from peftlite.io.content import Content, Info, told
from peftlite.io.files import Entry, Tensors, fitting
from peftlite.io.peft import folder as peft
from peftlite.io.peft.config import Config
from peftlite.io.unpickled import Unpickled
from peftlite.methods.attention import key_heads
from peftlite.methods.bottleneck import ACTIVATIONS, BottleneckAdapter
from peftlite.methods.full import FullTuning
from peftlite.methods.ia3 import IA3
from peftlite.methods.lora import LoRA
from peftlite.methods.prefix import PrefixTuning
from peftlite.table import listed, short

MODELS = ("adapter.safetensors", "pytorch_adapter.bin")
HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
HEAD = "head_config.json"

_KINDS = r"loras|adapters|refts|(?:attention|layer)_text_(?:task|lang)_adapters"  # the last are old
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "tanh": "tanh", "swish": "silu", "silu": "silu"}
_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # where a folder says no version

# what says where a method is, how it began or how it was trained
_HARMLESS = {
    "lora": """selfattn_lora intermediate_lora output_lora leave_out dtype dropout vera_b r
        alpha composition_mode attn_matrices""",
    "bottleneck": """mh_adapter output_adapter cross_adapter leave_out dropout stochastic_depth
        is_parallel original_ln_before original_ln_after residual_before_ln
        adapter_residual_before_ln inv_adapter_reduction_factor hypercomplex_nonlinearity
        factorized_phm_W factorized_phm_rule shared_W_phm shared_phm_rule learn_phm phm_dim
        phm_rank phm_bias phm_c_init phm_init_range""",
    "prefix_tuning": "encoder_prefix cross_prefix dropout shared_gating bottleneck_size",
    "reft": "output_reft layers dropout dtype",
}

_ENDS = ("before", "after")

Make = Callable[[], Tensor]


class Place(NamedTuple):
    """A sublayer of a block: where its bottleneck is kept, and the calls around it.

    `layer` gives y, `norm` takes the sum y + x, `sum` gives it, and `input` takes x alone.
    """

    home: str
    layer: str
    norm: str | None = None
    sum: str | None = None
    input: str | None = None


_BERT = (Place("output", "output.dense", norm="output.LayerNorm"),)
_LLAMA = (Place("attention_adapters", "self_attn"), Place("output_adapters", "mlp", sum=""))
_T5 = tuple(Place("", x, sum="") for x in ("SelfAttention", "EncDecAttention", "DenseReluDense"))
_PLACES: Mapping[str, tuple[Place, ...]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
    "distilbert": (
        Place("attention_adapters", "attention", norm="sa_layer_norm", input="attention"),
        Place("output_adapters", "ffn", norm="output_layer_norm", input="ffn"),
    ),
    "gpt2": (Place("attention_adapters", "attn"), Place("output_adapters", "mlp", sum="")),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "t5": _T5,
    "mt5": _T5,
}


def recognises(path: Path, file: Tensors | None) -> bool:
    """Whether a folder (or the file in it) is of this format, going by the files there."""
    folder = path if file is None else path.parent
    there = any((folder / name).is_file() for name in MODELS)
    return there and (folder / peft.CONFIG).is_file() and (file is None or path.name == MODELS[0])


def inspect(path: Path) -> Info:
    """What a folder says, its values not looked at. Raises FileError."""
    reading = Reading(path if path.is_dir() else path.parent)
    return Info(
        name="default",
        methods=list(reading.methods.items()),
        tensors=told(reading.file.entries),
        num_bytes=reading.file.num_bytes,
        format="adapterhub",
    )


def read(path: Path, model: nn.Module, sites: Sequence[Site]) -> Content:
    """A folder's content. Raises FileError."""
    folder = path if path.is_dir() else path.parent
    reading = Reading(folder, {name: site for site in sites for name in site.names}, model)
    reading.read_head(folder, model)
    made = reading.made
    return Content("default", list(reading.methods.items()), reading.entries, lambda k: made[k]())


class Reading:
    """A folder as it is understood; without a model, its methods and its own names alone."""

    where: str
    there: Mapping[str, Site] | None
    start: str
    about: Config
    model: Any
    config: Any
    kind: str

    def __init__(self, folder: Path, there: Mapping[str, Site] | None = None, model: Any = None):
        self.where, self.there = str(folder / peft.CONFIG), there
        self.start = f"{getattr(model, 'base_model_prefix', '')}."
        self.methods: dict[Method, list[str]] = {}
        self.entries: dict[str, Entry] = {}
        self.made: dict[str, Make] = {}
        self.about = Config(_settings(self.where), self.where)
        self.model = model
        self.config, self.kind = self._configured()
        self.file = _open(folder, MODELS)
        take = {
            "lora": self._low_rank, "bottleneck": self._bottleneck, "prefix_tuning": self._prefix,
            "reft": self._reft,
        }[self.kind]  # fmt: skip
        for path, keys in self._modules().items():
            with fitting(path, self._refuse):
                take(path, keys)
        self.config.finish()

    # -- what the folder says

    def _configured(self) -> tuple[Config, str]:
        """The settings of the adapter, and what it is."""
        its = self.about.take("config", {}, dict)
        kind = its.get("architecture") or "bottleneck"
        if kind not in _HARMLESS:
            raise self._refuse(
                f"has the architecture {short(kind)}, which can't be read; these can: "
                f"{', '.join(_HARMLESS)}; where it changes weights, model.merge_adapter there, and "
                "pl.extract makes a delta of the model before and after"
            )
        config = Config({**its, "peft_type": kind}, self.where)
        config.leave("architecture", "init_weights_seed", *_HARMLESS[kind].split())
        return config, kind

    def _modules(self) -> dict[str, dict[str, str]]:
        """The keys of each module, by the names of parameters there."""
        name = self.about.take("name", "", str)
        if self.kind == "prefix_tuning":
            with fitting("the pool of prefixes", self._refuse):
                return prefixes.pooled(self.file, name)
        pattern = re.compile(rf"(.*)\.(?:{_KINDS})\.{re.escape(name)}\.(.+)")
        modules: dict[str, dict[str, str]] = {}
        for key in self.file.entries:
            found = pattern.fullmatch(key)
            if found is None:
                raise self._refuse(f"has {key} in its tensors, which can't be read")
            modules.setdefault(found[1], {})[found[2]] = key
        return modules

    def _refuse(self, what: str) -> FileError:
        return FileError(f"{self.where!r} is of AdapterHub's adapters, and {what}")

    def _tensors(self, keys: Mapping[str, str], *names: str) -> list[Make]:
        """What gives each tensor of a module. Raises FileError unless it has these alone."""
        if other := {*keys} ^ {*names}:
            what = "has" if other & keys.keys() else "lacks"
            first = min(other & keys.keys() or other)
            raise self._refuse(f"a module {what} {first}, beside {listed(sorted(keys))}")
        return [lambda key=keys[name]: self.file.get(key) for name in names]

    def _entries(self, keys: Mapping[str, str], *names: str) -> list[Entry]:
        return [self.file.entries[keys[name]] for name in names]

    # -- where it is in the model

    def _site(self, address: str) -> Site:
        """The site of an address; a model with a head has the bare one under a name of its own."""
        found = self._known(address)
        if found is None:
            raise self._refuse(f"this model lacks {address}")
        return found

    def _known(self, address: str) -> Site | None:
        own = (address, self.start + address, address.removeprefix(self.start))
        return next((self.there[x] for x in own if x in self.there), None) if self.there else None

    def _add(self, method: Method, address: str, **tensors: tuple[Entry, Make]) -> None:
        """Adds a method's place, and its tensors there, by parameter."""
        self.methods.setdefault(method, []).append(address)
        for parameter, (entry, make) in tensors.items():
            key = f"{address}:{parameter}"
            self.entries[key], self.made[key] = entry, make

    # -- LoRA, (IA)³

    def _low_rank(self, path: str, keys: Mapping[str, str]) -> None:
        """W + (α/r)·BA, or α·b ⊙ y for the outputs y."""
        if self.config.take("composition_mode", "add", str) == "scale":
            return self._scales(path, keys)
        a, b = self._tensors(keys, "lora_A", "lora_B")
        rank, first, last = self.config.take("r", 8, int), *self._entries(keys, "lora_A", "lora_B")
        (inner, i), (outputs, r) = first.shape, last.shape
        if r != rank or inner % rank:
            raise self._refuse(f"has 'r' as {rank}, and {path} has {r}")
        method = LoRA(rank=rank, alpha=rank if self._is_old() else self.config.number("alpha", 8))
        for n, address in enumerate(self._parts(path, outputs, inner // rank)):
            size = outputs // (inner // rank)
            rows, ranks = slice(n * size, (n + 1) * size), slice(n * rank, (n + 1) * rank)
            self._add(
                method,
                address,
                a=(first._replace(shape=(rank, i)), lambda ranks=ranks: a()[ranks]),
                b=(last._replace(shape=(size, rank)), lambda rows=rows: b()[rows]),
            )

    def _scales(self, path: str, keys: Mapping[str, str]) -> None:
        """Scales of a map's outputs, which take its bias with them."""
        (b,), alpha = self._tensors(keys, "lora_B"), self.config.number("alpha", 1)
        (entry,), parts = self._entries(keys, "lora_B"), [path]
        outputs = entry.shape[0]
        if self.there is not None:
            whole = self._site(f"{path}.weight").layout.o
            if alpha != 1 and outputs != whole:
                raise self._refuse(f"{path} has 'alpha' as {alpha}, which scales what has no scale")
            parts = self._parts(path, outputs, 1 if outputs == whole else 3 * outputs // whole)
        for n, address in enumerate(parts):
            size = outputs // len(parts)
            rows = slice(n * size, (n + 1) * size)
            make: Make = lambda rows=rows: alpha * b()[rows].flatten()  # noqa: E731
            self._add(IA3(), address, l=(entry._replace(shape=(size,)), make))
            bias = address.replace(".weight", ".bias")
            if self._known(bias.partition("[")[0]) is not None:
                self._add(IA3(), bias)

    def _is_old(self) -> bool:
        """Whether α had no effect in training, as in adapters before 1.1."""
        found = re.match(r"adapters\.(\d+)\.(\d+)", self.about.take("version", "", str))
        return found is not None and (int(found[1]), int(found[2])) < (1, 1)

    def _parts(self, path: str, outputs: int, count: int) -> list[str]:
        """The addresses of a weight, or of the parts of a fused one that are changed."""
        if self.there is None:
            return [path] * count
        site = self._site(f"{path}.weight")
        if outputs == site.layout.o and count == 1:
            return [site.address]
        said = [part for part in "qkv" if part in self.config.names("attn_matrices")]
        if len(said) != count or 3 * outputs != count * site.layout.o:
            raise self._refuse(f"{path} has {outputs} outputs, of {site.layout.o} in this model")
        return [f"{site.address}[{part}]" for part in said]

    # -- bottlenecks

    def _bottleneck(self, path: str, keys: Mapping[str, str]) -> None:
        """y + s·U·f(Dz + d) + u, at the call that its settings come to in such a model."""
        names = [f"adapter_{x}.{y}" for x in ("down.0", "up") for y in ("weight", "bias")]
        made = self._tensors(keys, *names)
        entries = self._entries(keys, *names)
        settings: dict[str, Any] = {
            "bottleneck_size": self._size(path, *entries[2].shape),
            "activation": self._activation(),
            "scale": self.config.number("scaling", 1.0),
        }
        preset, address = self._placed(path) if self.there is not None else ("houlsby", path)
        parameters = ("down", "down_bias", "up", "up_bias")
        own = dict(zip(parameters, zip(entries, made, strict=True), strict=True))
        self._add(BottleneckAdapter(preset=preset, **settings), address, **own)

    def _size(self, path: str, o: int, r: int) -> int:
        """The width of a bottleneck, which the settings say for all layers or for each."""
        said = self.config.take("reduction_factor", 16, int, float, dict)
        factors = said.values() if isinstance(said, dict) else [said]
        if r not in {max(1, int(o // factor)) for factor in factors}:
            raise self._refuse(f"has 'reduction_factor' as {short(said)}, and {path} {r} of {o}")
        return r

    def _activation(self, default: str = "relu") -> Any:
        name = self.config.take("non_linearity", default, str).lower()
        name = name if self.about.take("version", "", str) else _RENAMED.get(name, name)
        if name not in _ACTIVATIONS:
            raise self._refuse(
                f"has {name!r} as its non_linearity: here are {', '.join(_ACTIVATIONS)}"
            )
        return _ACTIVATIONS[name]

    def _placed(self, path: str) -> tuple[str, str]:
        """The preset and the address that settings come to, for what a model keeps at a path."""
        kind = self.about.take("model_type", "", str)
        for place in _PLACES.get(kind, ()):
            block = path.removesuffix(place.home).removesuffix(".")
            if path.endswith(place.home) and self._known(_called(block, place.layer)):
                preset, call = self._chosen(place)
                if call is None:
                    break
                return preset, self._site(_called(block, call)).address
        raise self._refuse(
            f"what it reads and changes at {path} is no call of this model, with its model_type "
            f"{kind!r}, is_parallel, original_ln_before, original_ln_after and residual_before_ln"
        )

    def _chosen(self, place: Place) -> tuple[str, str | None]:
        """The preset and the call; None if there is no such call."""
        before, after = (self.config.flag(f"original_ln_{x}", x == "after") for x in _ENDS)
        around = self.config.take("residual_before_ln", True, bool, str)
        if self.config.flag("is_parallel"):
            return "parallel", place.input if after else None
        if not before:
            return "houlsby", place.layer if after and around != "post_add" else None
        if around is not after:
            return "", None
        if place.norm is None:
            return "houlsby", place.sum
        return "pfeiffer" if after else "houlsby", place.norm

    # -- prefixes

    def _prefix(self, place: str, keys: Mapping[str, str]) -> None:
        """[P_k; K] and [P_v; V] in the attentions of a kind, which are a part of its table."""
        kind = self.about.take("model_type", "", str)
        n = int(self.config.number("prefix_length", 30))
        names = (prefixes.CONTROL,) if self.config.flag("flat") else prefixes.NETWORK
        self._tensors(keys, *names)
        out = self.config.take("leave_out", [], list)
        act = ACTIVATIONS[self._activation("tanh")]
        method = PrefixTuning(prefix_length=n)
        if self.there is None:
            self.methods.setdefault(method, []).append(place)
            return
        if kind not in prefixes.MODELS:
            raise self._refuse(
                f"its prefixes are for a model of the type {kind!r}, where adapters computes "
                f"another attention: these can be read: {', '.join(prefixes.MODELS)}"
            )
        found = prefixes.attentions(self.model, [*dict.fromkeys(self.there.values())], place)
        sites = [site for number, site in found if number not in out]
        for i, site in enumerate(sites):
            h, d = key_heads(site.module)

            def part(get: Callable[[str], Tensor], i: int = i, h: Any = h, d: Any = d) -> Tensor:
                rows = prefixes.table(keys, get, act).view(n, len(sites), 2, h, d)
                return rows[:, i].permute(1, 2, 0, 3)

            entry = Entry.of(part(lambda key: self.file.entries[key].meta))
            self._add(method, site.address, prefix=(entry, lambda part=part: part(self.file.get)))
        if not sites:
            raise self._refuse(f"its {place} is of attention that this model hasn't")

    # -- ReFT

    def _reft(self, path: str, keys: Mapping[str, str]) -> None:
        """h + Rᵀ(Wh + b − Rh) for the first and last positions of what a block gives."""
        how = reft.How.of(self.config, self.about.take("model_type", "", str))
        self._tensors(keys, *how.keys)
        w, b = self._entries(keys, *how.keys[:2])
        if w.shape[0] != how.method.rank or w.shape[0] >= w.shape[1]:
            raise self._refuse(
                f"has 'r' as {how.method.rank}, and {path} {w.shape[0]} of {w.shape[1]}"
            )
        made = functools.cache(lambda: how.tensors(lambda name: self.file.get(keys[name])))
        own: dict[str, tuple[Entry, Make]] = {
            name: (entry, lambda name=name, dtype=entry.dtype: made()[name].to(dtype))
            for name, entry in {"v": w, "w": w, "b": b}.items()
        }
        call = _called(path.removesuffix(".reft_layer"), "")
        self._add(how.method, call if self.there is None else self._site(call).address, **own)

    # -- the head

    def read_head(self, folder: Path, model: Any) -> None:
        """Adds the head that is saved beside an adapter, where the model is of its class."""
        bare = getattr(model, "base_model", None) is model
        if bare or not any((folder / name).is_file() for name in HEADS):
            return
        about = Config(_settings(str(folder / HEAD)), str(folder / HEAD))
        kind = about.take("model_class", "", str)
        if kind != type(model).__name__:
            raise self._refuse(
                f"beside it is the head of a {kind}, and this is a {type(model).__name__}: load it "
                f"into the bare model, or take {HEAD} and its tensors out of the folder"
            )
        file, buffers = _open(folder, HEADS), dict(model.named_buffers())
        for key in file.entries:
            with fitting(key, self._refuse):
                head = file.get(key)
                if key in buffers and torch.equal(buffers[key], head.to(buffers[key])):
                    continue  # BART's bias of its logits, which isn't trained
                site = self._site(key)
                change = head.to(site.whole) - site.whole.expand(head.shape)
                if change.any():
                    self._add(
                        FullTuning(), site.address, difference=(Entry.of(change), change.clone)
                    )


def _settings(path: str) -> dict[str, Any]:
    data = peft.read_settings(path)
    return data if isinstance(data, dict) else {}


def _open(folder: Path, names: Sequence[str]) -> Tensors:
    safe, pickled = (folder / name for name in names)
    return Tensors(safe) if safe.is_file() else Unpickled(pickled)


def _called(block: str, call: str) -> str:
    return ".".join(filter(None, (block, call))) + CALL
