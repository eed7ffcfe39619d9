"""Methods: what PEFT's settings mean for a model, as methods of peftlite's at its tensors.

A setting is read where those of a file are: what a module has is asked of its `Form`, which modules
of io/peft/targets.py. A setting that training in peft heeds, and peftlite hasn't, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from peftlite.compat.peft.configs import PeftConfig
from peftlite.compat.peft.defaults import default_of, feedforward_of
from peftlite.core.delta import Delta
from peftlite.core.patch import Method
from peftlite.core.site import Site, keeps_statistics, sites, walk
from peftlite.errors import PeftliteError
from peftlite.io.peft.config import Config, ends
from peftlite.io.peft.folder import CLASSIFIES, GENERATES, PREFIX, PROMPTS, ROWS
from peftlite.io.peft.form import Form, Layer
from peftlite.io.peft.forms import FORMS
from peftlite.io.peft.reading.prompts import places_of
from peftlite.io.peft.targets import first_names, replaced, targeted
from peftlite.io.peft.writing import AS_IN
from peftlite.io.peft.writing.replaced import HEADS
from peftlite.methods.bitfit import BitFit
from peftlite.methods.fourier import FourierFT
from peftlite.methods.full import FullTuning
from peftlite.methods.ia3 import IA3
from peftlite.methods.lokr import LoKr
from peftlite.methods.norm import NormTuning
from peftlite.methods.prefix import PrefixPatch, PrefixTuning
from peftlite.methods.prompt import PromptTuning, encoder, takers
from peftlite.methods.ptuning import PTuning
from peftlite.methods.shira import SHiRA
from peftlite.methods.sparse import SparseMask
from peftlite.table import listed, short

_FOREIGN = "trust_remote_code"  # which a setting of a file must not ask for
# what a file's outputs don't go by, and training does
_REFUSED = frozenset(
    """rank_dropout rank_dropout_scale module_dropout vera_dropout vblora_dropout boft_dropout
    loftq_config eva_config corda_config lora_ga_config velora_config monteclora_config use_qalora
    mask_type coft block_share init_logits_std init_vector_bank_bound lora_bias apply_GS
    use_effective_conv2d ensure_weight_tying layer_replication kasa_config
    encoder_dropout""".split()
)
_STARTS = ("init_weights", "init_ia3_weights", "init_lora_weights")
_INITS = {True: "kaiming", "gaussian": "gaussian", "pissa": "pissa", "olora": "olora"}
Found = list[tuple[Method, str]]
"""Methods, each with the address of one tensor."""


class Wanted:
    """What a config asks of a model: its `methods`, and how their parameters begin.

    Args:
        trained: whether a prompt comes of the network it is trained as, or is rows, as in a file.
    """

    def __init__(self, config: PeftConfig, model: nn.Module, trained: bool = True):
        self.model, self.kind, self.trained = model, config.peft_type, trained
        data = _filled(config.given(), model)
        self.settings = Config({"peft_version": AS_IN, **data}, type(config).__name__)
        self.task: Any = data.get("task_type")
        self.start: Any = next((data[name] for name in _STARTS if name in data), True)
        self.settings.leave(*_STARTS)
        for name in sorted(_REFUSED & data.keys()):
            self._refuse(name)
        self.sites: dict[str, Site] = {name: s for s in sites(model) for name in s.names}
        self.modules: dict[str, nn.Module] = dict(walk(model))
        self.paths = first_names(self.modules)
        self.methods: list[Method] = [*self._methods()]
        self.settings.finish()

    def _refuse(self, name: str) -> NoReturn:
        raise PeftliteError(
            f"{self.settings.path!r} has {name!r} as {short(self.settings.data[name])}, which "
            "peftlite doesn't train as peft does: leave it out, or see what pl.attach has for it "
            "in docs/coming_from_peft.md"
        )

    def _methods(self) -> Iterator[Method]:
        if self.kind in PROMPTS:
            yield self._prompt()
        if self.task in HEADS:
            own = self.settings.names("modules_to_save")
            self.settings.data["modules_to_save"] = [*own, *HEADS[self.task]]
        found: Found = [*self._own(), *self._tokens(), *self._replaced()]
        found += self._biases({address for _, address in found})
        by_method: dict[Method, list[str]] = {}
        for method, address in found:
            self._check_tie(method, address)
            by_method.setdefault(method, []).append(address)
        for method, addresses in by_method.items():
            yield replace(method, targets=addresses)

    def _check_tie(self, method: Method, address: str) -> None:
        names = [name for name in self.sites[address].names if name != address]
        if names and not isinstance(method, SparseMask):
            raise PeftliteError(
                f"{address} is tied to {listed(names)}, and peft would train it apart from that: "
                "untie them first, or let pl.attach change both"
            )

    # -- the adapter's own method

    def _own(self) -> Iterator[tuple[Method, str]]:
        """The method that each of its tensors has."""
        if self.kind in (*PROMPTS, ROWS):
            return
        data, form = self.settings.data, FORMS.get(self.kind)
        if not data.get("target_modules") and not data.get("target_parameters"):
            data["target_modules"] = default_of(self.kind, self.model)
        if self.kind == "IA3" and "feedforward_modules" not in data:
            data["feedforward_modules"] = feedforward_of(self.model)
        self.targets = [*targeted(self.settings, self.model, self.modules, self.paths)]
        parameters = [*self._parameters()]
        if not self.targets and not parameters:
            what = data.get("target_modules") or data.get("target_parameters")
            raise PeftliteError(
                f"{self.settings.path!r} has {short(what)} for its targets, and no module is "
                f"called that; there are, among others: {listed(sorted(self._last_names()))}"
            )
        for path in self.targets:
            yield from self._norms(path) if form is None else self._module(form, path)
        for address in parameters:
            layer = Layer(address.rpartition(".")[0], self.sites[address], by_name=True)
            yield self._method(FORMS["LORA"], layer), address

    def _last_names(self) -> set[str]:
        return {path.rpartition(".")[2] for path in self.paths if path} - {*map(str, range(999))}

    def _parameters(self) -> Iterator[str]:
        """The tensors that peft takes by name."""
        names = self.settings.names("target_parameters") if self.kind == "LORA" else []
        for address, site in self.sites.items():
            if not site.is_call and any(ends(address, name) for name in names):
                yield address

    def _norms(self, path: str) -> Iterator[tuple[Method, str]]:
        for address, site in self.sites.items():
            if address.startswith(f"{path}.") and not site.is_call:
                yield NormTuning() if site.whole.dim() == 1 else FullTuning(), address

    def _module(self, form: Form, path: str) -> Iterator[tuple[Method, str]]:
        site = self.sites.get(f"{path}.weight")
        if site is None or not form.taken(site):
            raise PeftliteError(
                f"{path} is a {type(self.modules[path]).__name__}, which peft's {self.kind} "
                "doesn't take, or not as it runs: leave it out of target_modules, or use pl.attach"
            )
        method = self._method(form, Layer(path, site))
        yield method, f"{path}.weight"
        bias = f"{path}.bias"
        if isinstance(method, IA3) and not method.feedforward and bias in self.sites:
            yield method, bias

    def _method(self, form: Form, layer: Layer) -> Method:
        known = _INITS if self.kind == "LORA" else {"lycoris": None}
        if isinstance(self.start, str) and self.start not in known:
            self._refuse(next(name for name in _STARTS if name in self.settings.data))
        method = form.method(self.settings, layer, {})
        if isinstance(method, FourierFT):
            return replace(
                method, init="zero" if "init_weights" in self.settings.data else "normal"
            )
        if isinstance(method, SHiRA):
            seed = self.settings.data.get("random_seed")
            return replace(method, seed=torch.initial_seed() % 2**63 if seed is None else seed)
        init = known.get(self.start)
        return replace(method, init=init) if init else method

    # -- what is beside it

    def _tokens(self) -> Iterator[tuple[Method, str]]:
        """The rows of embeddings that train."""
        setting = "token_indices" if self.kind == ROWS else "trainable_token_indices"
        tokens = self.settings.take(setting, None, list, dict)
        if not tokens:
            return
        if isinstance(tokens, list):
            model: Any = self.model
            outer = [path for path, m in self.modules.items() if m is model.get_input_embeddings()]
            names = self.settings.names("target_modules") if self.kind == ROWS else []
            tokens = dict.fromkeys(names or outer[:1], tokens)
        scores: dict[str, Tensor] = {}
        for name, rows in tokens.items():
            path = next((path for path in self.paths if ends(path, name)), name)
            address = f"{path}.weight"
            if address not in self.sites:
                raise PeftliteError(
                    f"{self.settings.path!r} has tokens of {name}, which no module is called"
                )
            n, *each = self.sites[address].shape
            score = torch.zeros(n, *(1 for _ in each))
            score[rows] = 1
            scores[address] = score.expand(n, *each)  # the delta keeps it: a number for each row
        chosen = sum(s.count_nonzero().item() for s in scores.values())
        count = sum(map(torch.numel, scores.values()))
        method = SparseMask(fraction=chosen / count, select="given", scores=scores)
        yield from ((method, address) for address in scores)

    def _replaced(self) -> Iterator[tuple[Method, str]]:
        """All of the modules of which peft trains a copy."""
        for path in self.paths:
            if not replaced(self.settings, path):
                continue
            if keeps_statistics(self.modules[path]):
                raise PeftliteError(
                    f"{self.settings.path!r} has {path} in 'modules_to_save', whose running "
                    "statistics stay the base's here: leave it out"
                )
            for slot in self.modules[path]._parameters:
                if (address := f"{path}.{slot}") in self.sites:
                    yield FullTuning(), address

    def _biases(self, taken: Container[str]) -> Iterator[tuple[Method, str]]:
        bias, form = self.settings.take("bias", "none", str), FORMS.get(self.kind)
        if bias not in ("none", "all", form.bias if form else None):
            self._refuse("bias")
        for address, site in self.sites.items():
            path = address.rpartition(".")[0]
            own = bias == "all" or (bias != "none" and path in self.targets)
            if own and not site.is_call and "bias" in address and address not in taken:
                yield BitFit() if site.whole.dim() == 1 else FullTuning(), address

    # -- prompts

    def _prompt(self) -> Method:
        take = self.settings.take
        n, width = take("num_virtual_tokens", 0, int), self.settings.data["token_dim"]
        hidden = take("encoder_hidden_size", width, int)
        for name in self.settings.data:
            if name.startswith(("num_", "token", "prompt_tuning_", "encoder_")):
                self.settings.leave(name)
        if self.kind == PREFIX:
            heads = self.settings.data["num_attention_heads"]
            made = self.settings.flag("prefix_projection") and self.trained
            return PrefixTuning(
                prefix_length=n, reparametrize=made, hidden_size=hidden, positions="shifted",
                num_heads=heads, head_dim=width // heads,
            )  # fmt: skip
        where = self._place()
        if self.kind == PROMPTS[0] or not self.trained:
            return PromptTuning(prompt_length=n, **where, **self._words())
        kind = self.settings.data.get("encoder_reparameterization_type", "MLP")
        if self.settings.data.get("encoder_num_layers", 2) != 2:
            self._refuse("encoder_num_layers")
        return PTuning(prompt_length=n, encoder=kind.lower(), hidden_size=hidden, **where)

    def _place(self) -> dict[str, Any]:
        """Where a prompt goes in: before all of the model, or before its encoder."""
        if self.task == GENERATES[1]:
            return {}
        calls = takers([*self.sites.values()])
        at = next((site.address for site in calls if not encoder(site.module)), None)
        fill = {"labels": None} if self.task == CLASSIFIES else {}
        return {"targets": at, "cut": False, "embeds": self.task not in GENERATES, "fill": fill}

    def _words(self) -> dict[str, Any]:
        """What a prompt's rows begin as."""
        data = self.settings.data
        init = data.get("prompt_tuning_init", "RANDOM") if self.trained else "RANDOM"
        if init == "RANDOM":
            return {}
        n = data["num_virtual_tokens"]
        if init == "TEXT":
            from transformers import AutoTokenizer

            kept = {k: x for k, x in data.get("tokenizer_kwargs", {}).items() if k != _FOREIGN}
            tokenizer = AutoTokenizer.from_pretrained(data["tokenizer_name_or_path"], **kept)
            return {
                "init": "text",
                "init_ids": tokenizer(data["prompt_tuning_init_text"])["input_ids"],
            }
        model: Any = self.model
        ids = torch.randint(model.get_input_embeddings().num_embeddings, (n,)).tolist()
        return {"init": "text", "init_ids": ids}

    # -- how it begins

    @torch.no_grad()
    def begin(self, delta: Delta) -> None:
        """Gives parameters what they begin as in peft, where that isn't what they have."""
        prefixes = [
            item.patch for item in delta.placed.values() if isinstance(item.patch, PrefixPatch)
        ]
        if self.task == GENERATES[1] and not any("up" in p._parameters for p in prefixes):
            _share(prefixes)
        words = self.settings.data.get("prompt_tuning_init", "RANDOM") != "RANDOM"
        for item in delta.placed.values():
            if isinstance(item.method, PromptTuning) and not words:
                for rows in item.patch.parameters():
                    rows.normal_()
            elif isinstance(item.method, LoKr) and self.start is True:
                for name, factor in item.patch.named_parameters():
                    if name in ("w1", "w1a"):
                        factor.zero_()
                    else:
                        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
            elif self.start is False and not isinstance(item.method, FullTuning | BitFit):
                for parameter in item.patch.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)


def _share(patches: Sequence[Any]) -> None:
    """Has layers of a decoder learn one prefix where peft, which takes every other place, does."""
    prefixes = [patch.prefix for patch in patches]
    places = places_of(len(patches), len(patches), doubled=True)
    for patch, place in zip(patches, places, strict=True):
        patch.prefix = prefixes[place]


def _filled(data: dict[str, Any], model: Any) -> dict[str, Any]:
    """Settings, with the sizes that peft takes from a model where a prompt's say none."""
    if data["peft_type"] not in PROMPTS:
        return data
    its = model.config.get_text_config(decoder=False).to_dict()

    def first(*names: str) -> Any:
        return next(its[name] for name in names if its.get(name) is not None)

    heads = first("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
    width = first("hidden_size", "n_embd", "d_model")
    if data["peft_type"] == PREFIX and "num_key_value_heads" in its:
        kept = its["num_key_value_heads"]
        heads, width = kept, (its.get("head_dim") or width // heads) * kept
    sizes = {
        "num_layers": first("num_hidden_layers", "num_layers", "n_layer"),
        "num_attention_heads": heads, "token_dim": width,
        "num_transformer_submodules": 1 + (data.get("task_type") == GENERATES[1]),
    }  # fmt: skip
    return {**sizes, **data}
