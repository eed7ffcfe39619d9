"""LoRA, DoRA and AdaLoRA in PEFT: products of two factors, in the layout of each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlite.core import maps
from peftlite.core.patch import Method
from peftlite.core.site import Site
from peftlite.errors import FileError, PeftliteError
from peftlite.io.peft.config import Config
from peftlite.io.peft.form import (
    Form,
    Layer,
    Parts,
    Tensors,
    agreed,
    embeds,
    fit,
    flagged,
    rank_of,
    size_of,
)
from peftlite.io.peft.forms.vectors import added_bias
from peftlite.methods.adalora import AdaLoRA
from peftlite.methods.dora import DoRA, DoRAPatch
from peftlite.methods.lora import LoRA

# what training alone uses, of VeLoRA and MonteCLoRA
UNUSED = ("lora_velora_embed", *(f"lora_monteclora_sampler.{name}" for name in (
    "expert_weights", "expert_weights_prior", "gaussian_var_prior", "std_prior",
)))  # fmt: skip
# starts that leave the base as it is
PLAIN = (True, False, "gaussian", "eva", "orthogonal", "mica")


class LoRAForm(Form):
    type = "LORA"
    kinds: ClassVar[tuple[type[Method], ...]] = (LoRA, DoRA)
    names: ClassVar[tuple[tuple[str, str], ...]] = (
        ("lora_A.weight", "a"), ("lora_embedding_A", "a"), ("lora_B.weight", "b"),
        ("lora_embedding_B", "b"), ("lora_magnitude_vector", "m"), ("lora_B.bias", ""),
        ("lora_diag", ""),
        *((name, "") for name in UNUSED),
    )  # fmt: skip
    layers: ClassVar[tuple[type[maps.Map], ...]] = (
        maps.Linear,
        maps.TransposedLinear,
        maps.Embedding,
    )
    convs: ClassVar[tuple[int, ...]] = (1, 2, 3)
    # of a grouped one its change sees the inputs of all groups
    forgets: ClassVar[tuple[str, ...]] = ("padding_mode", "dilation", "groups")
    bias: ClassVar[str | None] = "lora_only"

    def method(self, config: Config, layer: Layer, t: Tensors) -> LoRA:
        n = size_of(t, "lora_A.weight", "lora_embedding_A")
        init = config.take("init_lora_weights", True, bool, str)
        if init not in (*PLAIN, "pissa", "olora"):
            raise FileError(
                f"{config.path!r} has 'init_lora_weights' as {init!r}, whose base isn't the "
                "model's own: save it with path_initial_model_for_weight_conversion= in peft"
            )
        # peft has QALoRA on packed weights alone
        config.leave("use_qalora", "monteclora_config")
        stacked = layer.stacked and layer.site.whole.dim() == 3
        flagged(config, layer, "lora_bias", "lora_B.bias", t)
        dora = flagged(config, layer, "use_dora", "lora_magnitude_vector", t)
        method = (DoRA if dora else LoRA)(
            rank=rank_of(config, layer, n and n / (len(layer.site.whole) if stacked else 1)),
            alpha=config.patterned("alpha_pattern", layer.name, config.number("lora_alpha", 8)),
            dropout=config.number("lora_dropout", 0.0),
            scaling="rslora" if config.flag("use_rslora") else "alpha/r",
            init=init if init in ("pissa", "olora") else "kaiming",
        )
        if not flagged(config, layer, "kasa_config", "lora_diag", t):
            return method
        if method.init != "kaiming":
            raise FileError(
                f"{config.path!r} has both 'kasa_config' and 'init_lora_weights' as {init!r}, "
                "which take of the base one after the other: what peft merges is another change, "
                "which pl.extract takes from the merged model"
            )
        rank = 2 * method.rank  # it takes as much out of W
        return replace(method, rank=rank, alpha=method.scale * rank, scaling="alpha/r")

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

    def _keys(self, layer: Layer) -> tuple[str, str]:
        rows = embeds(layer.site.module) and not layer.stacked
        kind = "lora_embedding_{}" if rows else "lora_{}.weight"
        return kind.format("A"), kind.format("B")

    def ours(self, t: Tensors, layer: Layer) -> Tensors:
        a, b = (t.pop(key) for key in self._keys(layer))
        whole, ones, layout = layer.site.whole, layer.ones, layer.site.layout
        if layer.by_name and layout.joined:
            raise ValueError(f"{layer.name} is a kernel, which peft takes for a stack of matrices")
        if ones:
            a, b = fit(a, -1, *whole.shape[1:]).flatten(1), fit(b, -1, -1, *ones).flatten(1)
        elif layer.stacked and whole.dim() == 3:
            e = len(whole)
            a, b = a.unflatten(0, (e, -1)), b.unflatten(1, (-1, e)).permute(2, 0, 1)
            # of one matrix, peft's product is never turned
            if e > 1 and (layer.old or getattr(layer.site.module, "is_transposed", False)):
                a, b = b.mT, a.mT
        elif layer.by_name and layout.transposed:
            a, b = b.mT, a.mT
        elif layer.blocks > 1:
            a, b = _whole(a, whole.shape[1], layer.blocks), _whole(b, len(a), layer.blocks)
        # peft runs an attention with this change twice in its last map, and merges it so
        found = {"a": a, "b": 2 * b if layer.inner else b}
        if "lora_magnitude_vector" in t:
            m = t.pop("lora_magnitude_vector")
            found["m"] = fit(m, 1, -1, *ones).flatten() if ones else m
        return found

    def parts(self, method: LoRA, t: Tensors, layer: Layer) -> Parts:
        bias, diag = t.pop("lora_B.bias", None), t.pop("lora_diag", None)
        for name in UNUSED:
            t.pop(name, None)
        on_meta = all(x.is_meta for x in t.values())
        found = super().parts(method, t, layer)
        if diag is not None:
            found[0][1].update(_truncating(found[0][1], diag, method.scale, layer.site))
        if method.init != "kaiming":
            found[0][1].update(self._start(method, layer.site, on_meta))
        if bias is not None and layer.site.slot != "in_proj_weight":  # where peft never adds it
            found.append(added_bias(layer.site.module, method.scale * bias))
        return found

    @torch.no_grad()
    def _start(self, method: LoRA, site: Site, on_meta: bool) -> Tensors:
        """B₀A₀, which peft takes out of the base: what the base's own weights give."""
        patch = method.build(replace(site, on="meta" if on_meta else None))
        if not on_meta:
            patch.reset(site.tensor)
        return {f"{site.slot}:{name}": getattr(patch, name) for name in ("a0", "b0")}

    def theirs(self, patch: Any, layer: Layer) -> Tensors:
        a, b = (x.detach() for x in patch.factors())
        module, ones = layer.site.module, layer.ones
        if layer.turned:
            a, b = b.mT.contiguous(), a.mT.contiguous()
        if ones:
            a, b = a.reshape(-1, *layer.site.shape[1:]), b.reshape(*b.shape, *ones)
        elif a.dim() == 3:
            if getattr(module, "is_transposed", False):
                a, b = b.mT, a.mT
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        found = dict(zip(self._keys(layer), (a, b / 2 if layer.inner else b), strict=True))
        if isinstance(patch, DoRAPatch):
            m = patch.m.detach()
            found["lora_magnitude_vector"] = m.reshape(1, -1, *ones) if ones else m
        return found

    def taken(self, site: Site) -> bool:
        module, inner = site.module, nn.modules.linear.NonDynamicallyQuantizableLinear
        if site.layout.joined:
            return super().taken(site)
        if isinstance(module, nn.MultiheadAttention | inner):
            return site.slot in ("in_proj_weight", "weight")
        # of one matrix that is (i, o), peft adds the change of one that is (o, i)
        turned = getattr(module, "is_transposed", False) and site.layout.stack == (1,)
        return super().taken(site) or (site.tensor.dim() in (2, 3) and not turned)


@torch.no_grad()
def _truncating(its: Mapping[str, Any], diag: Tensor, scale: float, site: Site) -> Tensors:
    """KaSA's s·B diag(λ) A without the r last of W's singular components, as one product."""
    (a_key, a), (b_key, b) = sorted(its.items())
    r, w = len(diag), site.tensor.to(a.device, torch.float32)
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    b_last, a_last = u[:, -r:] * s[-r:] / -scale, v[-r:]
    return {
        a_key: torch.cat([diag[:, None] * a, a_last.to(a.dtype)]),
        b_key: torch.cat([b, b_last.to(b.dtype)], 1),
    }


def _whole(x: Tensor, columns: int, blocks: int) -> Tensor:
    """A factor, which may be saved as the blocks of its diagonal, one above the other."""
    return torch.block_diag(*x.chunk(blocks)) if x.shape[1] * blocks == columns else x


class AdaLoRAForm(Form):
    type = "ADALORA"
    kinds: ClassVar[tuple[type[Method], ...]] = (AdaLoRA,)
    names: ClassVar[tuple[tuple[str, str], ...]] = (
        ("lora_A", "q"),
        ("lora_B", "p"),
        ("lora_E", "lam"),
    )
    layers: ClassVar[tuple[type[maps.Map], ...]] = (maps.Linear, maps.TransposedLinear)
    convs: ClassVar[tuple[int, ...]] = (2,)
    bias: ClassVar[str | None] = "lora_only"

    def method(self, config: Config, layer: Layer, t: Tensors) -> AdaLoRA | None:
        config.leave(
            "alpha_pattern", "use_rslora", "use_qalora", "kasa_config", "monteclora_config"
        )
        found, first = size_of(t, "lora_A"), config.number("init_r", 12)
        config.number("lora_alpha", 8)
        kept = config.take("rank_pattern", {}, dict).get(f"{layer.path}.lora_E")
        says = sum(map(bool, kept)) if isinstance(kept, list) else first
        rank = agreed(config, layer, "init_r" if kept is None else "rank_pattern", says, found)
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
        ranks = {path: its["r"] for path, its in settings.items()}
        r = max(ranks.values())
        same = {"r": r, "init_r": r, "target_r": min(its["target_r"] for its in settings.values())}
        found = super().joined({path: {**its, **same} for path, its in settings.items()})
        cut = {f"{path}.lora_E": [k < n for k in range(r)] for path, n in ranks.items() if n < r}
        found["rank_pattern"] = cut or None
        del found["r"]
        if "alpha_pattern" in found:
            raise PeftliteError("peft has one lora_alpha for all modules of an AdaLoRA")
        return {**found, "lora_alpha": found["lora_alpha"] * (r + 1e-5)}

    def ours(self, t: Tensors, layer: Layer) -> Tensors:
        found = super().ours(t, layer)
        return {**found, "lam": fit(found["lam"], -1, 1)[:, 0]}

    def theirs(self, patch: Any, layer: Layer) -> Tensors:
        found = super().theirs(patch, layer)
        return {**found, "lora_E": found["lora_E"][:, None]}
