"""Writing: a delta as a PEFT directory, and what keeps vLLM from serving one."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from peftlite.core import maps
from peftlite.core.assign import Placed
from peftlite.core.delta import Delta
from peftlite.core.merged import base_tensor
from peftlite.core.patch import apply
from peftlite.core.site import walk, whole_address
from peftlite.core.tensors import raw
from peftlite.errors import PeftliteError
from peftlite.io.files import (
    Tensors,
    as_json,
    as_path,
    is_finite,
    replacing,
    write_file,
)
from peftlite.io.folders import replacing_folder
from peftlite.io.peft.folder import (
    CONFIG,
    LAYER,
    MODEL,
    PREFIX,
    PROMPTS,
    START,
    TOKENS,
    WRAPPED,
    read_config,
)
from peftlite.io.peft.form import At, Form
from peftlite.io.peft.forms import FORMS
from peftlite.methods.full import AddPatch
from peftlite.methods.ia3 import ScalePatch
from peftlite.methods.prefix import PrefixTuning
from peftlite.methods.prompt import PromptTuning
from peftlite.methods.ptuning import PTuning
from peftlite.methods.sparse import SparsePatch
from peftlite.table import listed

AS_IN = "0.21.2"  # the peft that this agrees with
ALONE = "LN_TUNING"  # which trains a copy of any module, for what isn't beside another method
REPLACED = {CONFIG, MODEL, "README.md"}
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def write(delta: Delta, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Writes a delta as a folder that peft loads, with more `settings` of adapter_config.json."""
    config, tensors = plan(delta)
    config |= {"inference_mode": True, "peft_version": AS_IN, **as_json("settings", settings or {})}
    if config["peft_type"] in PROMPTS and not config.get("task_type"):
        raise PeftliteError(
            "peft puts a prompt where the task says: give settings={'task_type': 'CAUSAL_LM'}, or "
            "SEQ_CLS, SEQ_2_SEQ_LM, TOKEN_CLS, QUESTION_ANS, FEATURE_EXTRACTION"
        )
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise PeftliteError(f"{key} has values that aren't finite, so it could not be loaded")
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with replacing_folder(path, _kept) as folder:
        if (readme := path / "README.md").exists():
            shutil.copy2(readme, folder)
        write_file(folder / MODEL, tensors, {"format": "pt"})
        with replacing(folder / CONFIG) as file:
            file.write(text.encode())


def _kept(names: set[str]) -> str | None:
    """Why a folder with these names is not to be replaced."""
    if not names or (CONFIG in names and names <= REPLACED):
        return None
    return (
        f"it holds {listed(sorted(names - REPLACED or names))}, and nothing but an adapter is "
        "replaced"
    )


def plan(delta: Delta) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and the tensors that peft has for a delta. Raises PeftliteError."""
    placed = [*delta.placed.values()]
    for item in placed:
        item.check()
        if not item.site.is_call and item.site.whole.is_meta:
            raise PeftliteError(f"{item.site.address} is on the meta device: it has no values")
    with torch.no_grad():
        writing = Writing(delta)
    return writing.config, writing.tensors


def _mixed(placed: list[Placed]) -> str:
    kinds = ", ".join(dict.fromkeys(type(item.method).__name__ for item in placed))
    return (
        f"peft has one method in an adapter, and this delta has {kinds}: attach them as deltas of "
        "their own, or keep them together with pl.save"
    )


def _path(address: str) -> str:
    """The module of a tensor."""
    return whole_address(address).rpartition(".")[0]


def _nested(parameters: list[At]) -> dict[str, str]:
    """Where peft has the tensors of parameters, by name: the last of a module is outermost."""
    modules: dict[str, list[At]] = {}
    for at in parameters:
        modules.setdefault(at.path, []).append(at)
    found = {}
    for path, own in modules.items():
        order = [*own[0].site.module._parameters]
        for depth, at in enumerate(sorted(own, key=lambda at: -order.index(at.site.slot))):
            found[at.name] = path + ".base_layer" * depth
    return found


def _rows(item: Placed) -> Tensor | None:
    """The rows of an embedding that a patch changes, if it is all of a few rows."""
    site, patch = item.site, item.patch
    if maps.kind_of(site.module) is not maps.Embedding:
        return None
    if isinstance(patch, AddPatch) and site.index is not None and site.index[0] == 0:
        return torch.arange(*site.index[1:])
    if type(patch) is SparsePatch and site.index is None:
        d = site.whole.shape[1]
        rows = patch.indices.cpu().long()[::d] // d
        if torch.equal(patch.indices.cpu(), (rows[:, None] * d + torch.arange(d)).flatten().int()):
            return rows
    return None


class Writing:
    """A delta, as it is put into peft's words."""

    def __init__(self, delta: Delta):
        self.delta = delta
        self.tensors: dict[str, Tensor] = {}
        self.config: dict[str, Any] = {}
        self.layers: Counter[str] = Counter()  # that peft puts around modules for their parameters
        self.targets: set[str] = set()  # the paths of modules that a method has tensors of
        items = [*delta.placed.values()]
        forms = {kind: name for name, form in FORMS.items() for kind in form.kinds}
        forms |= dict.fromkeys((PromptTuning, PTuning), PROMPTS[0]) | {PrefixTuning: PREFIX}
        named = {name for i in items if (name := forms.get(type(i.method)))}
        if len(named) > 1:
            raise PeftliteError(_mixed(items))
        self.kind = next(iter(named), ALONE)
        self.form = FORMS.get(self.kind)
        own = [i for i in items if type(i.method) in forms]
        others = [i for i in items if i not in own]
        rows = [i for i in others if _rows(i) is not None]
        wholes = [i for i in others if i not in rows]
        for item in wholes:
            if not isinstance(item.patch, AddPatch):
                self._refuse(item, f"peft has no {type(item.method).__name__} there")
        if self.form:
            self._write_modules(self.form, own)
        elif own:
            self._write_prompt(own)
        if rows:
            self._write_rows(rows, alone=not own and not wholes)
        if wholes:
            self._write_wholes(wholes)
        self.config["peft_type"] = self.kind

    def _refuse(self, item: Placed, why: str) -> NoReturn:
        raise PeftliteError(
            f"{item.site.address} can't go into a PEFT directory, since {why}: leave it out with "
            "exclude=, or keep the delta with pl.save"
        )

    def _key(self, path: str) -> str:
        """What a path in the model is in peft's."""
        for outer, layers in self.layers.items():
            if path.startswith(f"{outer}.") and not path.startswith(f"{outer}.base_layer"):
                path = outer + ".base_layer" * layers + path.removeprefix(outer)
        return (WRAPPED if self.kind in PROMPTS else START) + path

    def _write_prompt(self, items: list[Placed]) -> None:
        """The rows of a prompt or a prefix, whatever network they come from."""
        found = [x.detach() for item in items for x in item.patch.saved().values()]
        if len({id(item.method) for item in items}) > 1 or len({x.shape for x in found}) > 1:
            self._refuse(items[0], "peft has one prompt in an adapter, or one shape of prefix")
        self.config = {"num_transformer_submodules": 1}
        if self.kind == PREFIX:
            _, heads, n, d = found[0].shape
            rows = torch.stack([x.cpu() for x in found]).permute(3, 0, 1, 2, 4).flatten(1)
            self.config |= {"num_layers": len(found), "num_attention_heads": heads}
            warnings.warn(
                f"peft has a sequence's positions begin at {n}, behind the prefix, and here they "
                f"begin at 0; for the same outputs there take {n} from position_ids",
                stacklevel=6,
            )
        else:
            (rows,) = found
            (n, d), heads = rows.shape, 1
        self.tensors["prompt_embeddings"] = rows
        self.config |= {"num_virtual_tokens": n, "token_dim": heads * d}

    # -- the modules that a method has tensors of

    def _write_modules(self, form: Form, items: list[Placed]) -> None:
        settings: dict[str, dict[str, Any]] = {}
        sites: list[tuple[Placed, At]] = []
        for item in items:
            if item.site.whole.dim() == 1:
                self._check_bias(item)
            else:
                sites.append((item, At(_path(item.site.address), item.site)))
        for item, at in sites:
            own = form.settings(item.method, item.patch)
            self._check(form, item, at)
            if settings.setdefault(at.name, own) != own:
                self._refuse(item, "peft has one setting for both maps of an attention")
        stacked = [at for _, at in sites if at.stacked]
        starts, self.layers = _nested(stacked), Counter(at.path for at in stacked)
        for item, at in sites:
            start = f"{at.name}.base_layer.out_proj" if at.inner else at.path
            start = self._key(starts.get(at.name, start))
            for name, tensor in form.theirs(item.patch, at).items():
                self.tensors[f"{start}.{name}"] = tensor
        shared = form.write_shared([item.patch for item in items])
        for name, tensor in zip(form.shared, shared, strict=True):
            self.tensors[f"base_model.{name}"] = tensor
        self.targets = {*settings} - {*starts}
        self.config = form.joined(settings)
        self.config["target_modules"] = sorted(self.targets) or None
        if starts:
            self.config["target_parameters"] = sorted(starts)
        if any(maps.kind_of(item.site.module) is maps.TransposedLinear for item in items):
            self.config["fan_in_fan_out"] = True

    def _check(self, form: Form, item: Placed, at: At) -> None:
        """Raises PeftliteError if peft doesn't take a site."""
        site, placed = item.site, self.delta.placed
        if site.index is not None:
            self._refuse(item, "peft takes whole weights")
        if len(site.owners) > 1:
            self._refuse(item, f"it is tied to {listed(site.names[1:])}, and peft would untie it")
        if not form.taken(site) or not at.path:
            self._refuse(item, f"peft's {self.kind} doesn't take a {type(site.module).__name__}")
        other = f"{at.name}.in_proj_weight" if at.inner else f"{at.path}.out_proj.weight"
        attention = at.inner or isinstance(site.module, nn.MultiheadAttention)
        if attention and not at.stacked and other not in placed:
            self._refuse(item, f"peft changes {other} with it, which the delta leaves as it is")
        if isinstance(item.patch, ScalePatch) and not item.patch.inputs:
            bias = placed.get(f"{at.path}.bias")
            if site.module.bias is not None and not (bias and bias.patch.l is item.patch.l):
                self._refuse(item, "peft scales its bias, too, which the delta leaves as it is")

    def _check_bias(self, item: Placed) -> None:
        weight = self.delta.placed.get(f"{_path(item.site.address)}.weight")
        if weight is None or getattr(weight.patch, "l", None) is not item.patch.l:
            self._refuse(item, "peft scales a bias with its weight alone")

    # -- what is saved as it is, not as a change

    def _value(self, item: Placed) -> Tensor:
        """A whole tensor with the delta in it, and nothing else."""
        whole, w = whole_address(item.site.address), item.site.whole
        if self.delta.merged_in is not None:
            w = base_tensor(self.delta.merged_in, item.site, but=self.delta)
        its = [i.patch for a, i in self.delta.placed.items() if whole_address(a) == whole]
        return apply(its, w)

    def _write_rows(self, items: list[Placed], alone: bool) -> None:
        """Rows of embeddings."""
        found: dict[str, Tensor] = {}
        for item in items:
            path, rows = _path(item.site.address), _rows(item)
            assert rows is not None
            found[path] = torch.cat([found[path], rows]) if path in found else rows
        inner = "" if alone else ".token_adapter"
        for item in items:
            path = _path(item.site.address)
            value = self._value(item)
            self.tensors[f"{self._key(path)}{inner}{TOKENS}"] = value[found[path].to(value.device)]
        indices = {path: rows.tolist() for path, rows in found.items()}
        if alone and len(indices) == 1:
            self.kind, ((path, rows),) = "TRAINABLE_TOKENS", indices.items()
            self.config = {"target_modules": [path], "token_indices": rows}
        elif self.kind == "LORA":
            self.config["trainable_token_indices"] = indices
        else:
            self._refuse(items[0], f"peft has rows of embeddings beside LoRA, and not {self.kind}")

    def _write_wholes(self, items: list[Placed]) -> None:
        """Modules of which tensors are changed entry by entry, and biases."""
        modules: dict[str, nn.Module] = {}
        slots: dict[str, set[str]] = {}
        values = {}
        for item in items:
            tied = len(item.site.owners) > 1
            for name, (module, slot) in zip(item.site.names, item.site.owners, strict=False):
                path = _path(name)
                modules[path] = module
                slots.setdefault(path, set()).add(slot)
                values[whole_address(name)] = self._value(item)
            if tied and len(item.site.names) != len(item.site.owners):
                self._refuse(item, "its module has two names, and another module has its weight")
        bias = self.form.bias if self.form else None
        biases = {path for path in modules if bias and slots[path] == {"bias"}}
        if biases:
            self.config["bias"] = bias if biases <= self.targets else "all"
        for path in biases:
            layer = f"{path}.base_layer" if path in self.targets else path
            self.tensors[f"{self._key(layer)}.bias"] = values[f"{path}.bias"]
        wholes = sorted(
            path
            for path in modules.keys() - biases
            if not any(path.startswith(f"{other}.") for other in modules)
        )
        for path in wholes:
            self._write_module(path, modules[path], values, items[0])
        if wholes:
            self.config["target_modules" if self.kind == ALONE else "modules_to_save"] = wholes

    def _write_module(
        self, path: str, module: nn.Module, values: Mapping[str, Tensor], item: Placed
    ) -> None:
        """All of a module, as peft takes it."""
        if not path or any(f"{t}.".startswith(f"{path}.") for t in self.targets):
            self._refuse(item, f"peft takes a copy of all of {path or 'the model'}")
        layer = path + (LAYER if self.kind == ALONE else ".")
        for name, part in walk(module, path):
            if parametrize.is_parametrized(part):
                self._refuse(item, f"{name} is parametrized")
            buffers = part._buffers.keys() - part._non_persistent_buffers_set
            held = {slot: raw(part, slot) for slot, p in part._parameters.items() if p is not None}
            held |= {slot: b for slot in buffers if (b := part._buffers[slot]) is not None}
            for slot, tensor in held.items():
                address = f"{name}.{slot}"
                rest = address.removeprefix(f"{path}.")
                self.tensors[f"{self._key(layer)}{rest}"] = values.get(address, tensor)


def check_vllm(what: Delta | str | os.PathLike[str], max_lora_rank: int = 16) -> list[str]:
    """What keeps vLLM from serving a delta, or a PEFT directory; empty if nothing does.

    Args:
        max_lora_rank: what the server is started with.

    Raises:
        FileError: there is no such directory.

    Example:
        delta = pl.attach(nn.Sequential(nn.Linear(4, 2)), pl.LoRA(rank=2))
        print(pl.check_vllm(delta, max_lora_rank=8) or "it can be served")
    """
    if isinstance(what, Delta):
        try:
            config, tensors = plan(what)
        except PeftliteError as error:
            return [str(error)]
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    else:
        config = read_config(as_path(what)).data
        entries = Tensors(as_path(what) / MODEL).entries
        shapes = {key: entry.shape for key, entry in entries.items()}
    if config["peft_type"] != "LORA":
        return [f"it is a {config['peft_type']}, and vLLM serves LoRA alone"]
    found = [f"it has {name}, which vLLM doesn't" for name in _UNSERVED if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append(f"it has biases (bias={config['bias']!r}), which vLLM leaves out")
    for key, shape in shapes.items():
        if not key.endswith((".lora_A.weight", ".lora_B.weight")) or len(shape) != 2:
            found.append(f"{key} isn't a factor of a linear map's change")
    rank = max([s[0] for key, s in shapes.items() if key.endswith(".lora_A.weight")], default=0)
    if rank > max_lora_rank:
        enough = next((r for r in RANKS if r >= rank), None)
        cure = f"start it with --max-lora-rank {enough}" if enough else "it takes 512 at most"
        found.append(f"its rank is {rank}, and the server takes {max_lora_rank}: {cure}")
    return found


_UNSERVED = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices",
    "target_parameters", "lora_bias",
)  # fmt: skip
