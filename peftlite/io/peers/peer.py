"""Peer: what a library calls the modules and the parameters of a delta in its files.

    lycoris_layers_0_q.lora_down.weight            kohya, LyCORIS
    unet.layers.0.q.lora_A.weight                  diffusers
    layers.0.q.lora_a.weight                       torchtune
    layers.0.q.parametrizations.weight.0.lora_A    minLoRA
    layers.0.q.lora_A                              loralib, litgpt

A key is a module's name, a dot, and a parameter's name. A `_` in kohya's names may be a dot or
itself: only a model can tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from peftlite.core.patch import Method
from peftlite.io.peers.turns import TURNS, Turn
from peftlite.methods.dora import DoRA
from peftlite.methods.full import FullTuning
from peftlite.methods.loha import LoHa
from peftlite.methods.lokr import LoKr
from peftlite.methods.lora import LoRA
from peftlite.methods.norm import NormTuning

Kind: TypeAlias = type[LoRA] | type[LoHa] | type[LoKr]

# what diffusers says of settings, and what convert adds where a file doesn't say it
CONFIG, ALPHA, PARTS = "lora_adapter_metadata", "alpha", "parts"

# which dimension of which parameter of ours is the rank
RANKS = (("b", 1), ("a", 0), ("w1b", 0), ("w2b", 0))


@dataclass(frozen=True)
class Peer:
    """The names in one library's files, and what else it does in its own way.

    Args:
        name: the library's.
        methods: what it calls our parameters, by method.
        older: what it called them once, with the name of now.
        dense: what it calls the difference of a whole tensor of a module: the tensor, our method.
        cores: what it calls the core of a kernel's factors, and which of ours takes it in.
        turns: what it has that is no product of factors, by our method.
        lacks: what it calls a parameter of a method that isn't here, and that method's name.
        starts: what its modules' names may begin with, and what may stand there in a model: on
            reading the first that does, on writing the longest.
        reads: the same of what others write with its parameters' names, as ComfyUI's do.
        joint: what is between the steps of a path.
        alpha: what a file says of α, if anything: a "key" for each module, or that it's the "rank",
            as it also is where keys are missing.
        fuses: whether A and B may be those of several parts of a weight, one after another.
        unrolls: whether A and B of a kernel are those of its rows, one after another.
        flips: whether A and B lie as the weight does, where that has its inputs first.
        norms: which dimension of DoRA's norms is the outputs': 0 for any weight, or 1 for a
            convolution's, where those of a matrix have no other.
        groups: whether it takes convolutions of several groups.
        ties: whether what has a tied weight, too, is changed with it.
    """

    name: str
    methods: Mapping[Kind, Mapping[str, str]]
    older: Mapping[str, str] = field(default_factory=dict)
    dense: Mapping[str, tuple[str, type[Method]]] = field(default_factory=dict)
    cores: Mapping[str, str] = field(default_factory=dict)
    turns: Mapping[type[Method], Turn] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)
    starts: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"": [""]})
    reads: Mapping[str, Sequence[str]] = field(default_factory=dict)
    joint: str = "."
    alpha: Literal["key", "rank"] | None = None
    fuses: bool = False
    unrolls: bool = False
    flips: bool = False
    norms: int = 0
    groups: bool = True
    ties: bool = False

    def split(self, key: str) -> tuple[str, str] | None:
        """A key as the names of a module and of a parameter; None if it isn't the peer's."""
        known = [name for names in self.methods.values() for name in names.values()]
        more = *self.dense, *self.cores, *self.lacks, *self._turned, *self.alone
        for name in (*known, *self.older, *more):
            if key.endswith(f".{name}"):
                return key.removesuffix(f".{name}"), self.older.get(name, name)
        return None

    @property
    def _turned(self) -> list[str]:
        return [turn.mark for turn in self.turns.values()]

    @property
    def alone(self) -> list[str]:
        """What it calls tensors that say nothing by themselves."""
        names = {name: None for turn in self.turns.values() for name in turn.others}
        return [*names] or ([ALPHA] if self.alpha else [])

    def paths(self, module: str) -> Iterator[str]:
        """What a module may be called in a model, its steps joined as the peer joins them."""
        module = self.joined(module.replace(f"_orig_mod{self.joint}", ""))  # torch.compile's word
        for start, own in {**self.starts, **self.reads}.items():
            if module.startswith(start):
                yield from (there + module.removeprefix(start) for there in own)

    def joined(self, path: str) -> str:
        """A path as the peer joins its steps."""
        return path.replace(".", self.joint)

    def module(self, path: str) -> str:
        """What the peer calls the module at a path."""
        joined = self.joined(path)
        start, there = max(
            ((s, t) for s, own in self.starts.items() for t in own if joined.startswith(t)),
            key=lambda pair: (len(pair[1]), -len(pair[0])),
        )
        return start + joined.removeprefix(there)


def _lora(a: str, b: str) -> dict[str, str]:
    return {"a": a, "b": b}


def _factors(*names: str, like: str) -> dict[str, str]:
    """Names such as `lokr_w1_a` for `w1a`."""
    return {name: like + name[:2] + "".join(f"_{c}" for c in name[2:]) for name in names}


_TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")
_KOHYA = _lora("lora_down.weight", "lora_up.weight")
_NORMS = {"m": "dora_scale"}
_DIFFUSERS = _lora("lora_A.weight", "lora_B.weight")
_TORCHTUNE = _lora("lora_a.weight", "lora_b.weight")

PEERS = (
    Peer(
        "kohya",
        {
            LoRA: _KOHYA,
            DoRA: {**_KOHYA, **_NORMS},
            LoHa: {**_factors("w1a", "w1b", "w2a", "w2b", like="hada_"), **_NORMS},
            LoKr: {**_factors("w1", "w1a", "w1b", "w2", "w2a", "w2b", like="lokr_"), **_NORMS},
        },
        dense={
            "diff": ("weight", FullTuning),
            "diff_b": ("bias", FullTuning),
            "w_norm": ("weight", NormTuning),
            "b_norm": ("bias", NormTuning),
        },
        turns=TURNS,
        cores={"lora_mid.weight": "a", "hada_t1": "w1b", "hada_t2": "w2b", "lokr_t2": "w2b"},
        lacks={
            "lambda_layer": "T-LoRA",
            **{f"{factor}.weight": "GLoRA" for factor in ("a1", "a2", "b1", "b2")},
        },
        starts={
            "lycoris_": [""],
            "lora_unet_": ["unet_", ""],
            # transformers took a `text_model` out of its encoders of text
            **{
                f"lora_{short}_{inner}": [f"{part}_", ""]
                for short, part in zip(("te", "te1", "te2", "te3"), _TEXT[:1] + _TEXT, strict=True)
                for inner in ("", "text_model_")
            },
        },
        reads={
            "diffusion_model_": ["", "unet_", "transformer_"],
            "lora_transformer_": ["transformer_", ""],
            "transformer_": [""],
            "unet_": [""],
            "": [""],
        },
        joint="_",
        alpha="key",
    ),
    Peer(
        "diffusers",
        {LoRA: _DIFFUSERS, DoRA: {**_DIFFUSERS, "m": "lora_magnitude_vector"}},
        older={
            "lora.down.weight": "lora_A.weight",
            "lora.up.weight": "lora_B.weight",
            "lora_linear_layer.down.weight": "lora_A.weight",
            "lora_linear_layer.up.weight": "lora_B.weight",
        },
        starts={
            "": [""],
            **{f"{part}.": [f"{part}.", ""] for part in ("unet", "transformer", *_TEXT)},
            **{f"{part}.text_model.": [f"{part}.", ""] for part in _TEXT},
        },
        reads={
            "diffusion_model.": ["", "unet.", "transformer."],
            "base_model.model.": ["", "unet.", "transformer."],
            "module.": [""],
        },
        alpha="rank",
        norms=1,
        groups=False,
    ),
    Peer("torchtune", {LoRA: _TORCHTUNE, DoRA: {**_TORCHTUNE, "m": "magnitude"}}),
    Peer(
        "minlora",
        {LoRA: _lora(*(f"parametrizations.weight.0.lora_{factor}" for factor in "AB"))},
        flips=True,
    ),
    Peer("loralib", {LoRA: _lora("lora_A", "lora_B")}, fuses=True, unrolls=True),
)
