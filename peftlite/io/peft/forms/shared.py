"""VeRA and VB-LoRA in PEFT: methods with tensors that are for all modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlite.core import maps
from peftlite.core.patch import Method
from peftlite.core.site import Site
from peftlite.errors import PeftliteError
from peftlite.io.peft.config import Config
from peftlite.io.peft.form import Form, Layer, Tensors, agreed, size_of
from peftlite.methods.vblora import VBLoRA
from peftlite.methods.vera import VeRA


class VeRAForm(Form):
    type = "VERA"
    kinds: ClassVar[tuple[type[Method], ...]] = (VeRA,)
    names: ClassVar[tuple[tuple[str, str], ...]] = (("vera_lambda_b", "b"), ("vera_lambda_d", "d"))
    layers: ClassVar[tuple[type[maps.Map], ...]] = (maps.Linear, maps.TransposedLinear)
    shared: ClassVar[tuple[str, ...]] = ("vera_A", "vera_B")
    bias: ClassVar[str | None] = "vera_only"

    def method(self, config: Config, layer: Layer, t: Tensors) -> VeRA:
        config.flag("save_projection")
        seed = config.take("projection_prng_key", 0, int)
        initial = config.number("d_initial", 0.1)
        rank = agreed(config, layer, "r", config.number("r", 256), size_of(t, "vera_lambda_d"))
        return VeRA(rank=rank, seed=seed, d_initial=initial)

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
    type = "VBLORA"
    kinds: ClassVar[tuple[type[Method], ...]] = (VBLoRA,)
    names: ClassVar[tuple[tuple[str, str], ...]] = tuple(
        (f"vblora_logits_{x.upper()}{end}", f"{own}_{x}")
        for x in "ab"
        for end, own in (("", "logits"), ("_topk_weights", "logits"), ("_topk_indices", "indices"))
    )
    layers: ClassVar[tuple[type[maps.Map], ...]] = (maps.Linear, maps.TransposedLinear)
    shared: ClassVar[tuple[str, ...]] = ("vblora_vector_bank",)
    bias: ClassVar[str | None] = "vblora_only"

    def method(self, config: Config, layer: Layer, t: Tensors) -> VBLoRA:
        compact = config.flag("save_only_topk_weights")
        a = "vblora_logits_A_topk_indices" if compact else "vblora_logits_A"
        return VBLoRA(
            rank=agreed(config, layer, "r", config.number("r", 4), size_of(t, a)),
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

    def ours(self, t: Tensors, layer: Layer) -> Tensors:
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

    def theirs(self, patch: Any, layer: Layer) -> Tensors:
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
