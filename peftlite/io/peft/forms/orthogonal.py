"""OFT, BOFT and HRA in PEFT: rotations and reflections of a weight."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from peftlite.core import maps
from peftlite.core.patch import Method
from peftlite.errors import FileError, PeftliteError
from peftlite.io.peft.config import Config
from peftlite.io.peft.form import Form, Layer, Parts, Tensors, agreed, fit, size_of
from peftlite.methods.boft import BOFT
from peftlite.methods.hra import HRA
from peftlite.methods.oft import OFT, skew

# of a stride and a padding they take the first number
FIRST = ("padding_mode", "dilation", "groups", "stride", "padding")


class OFTForm(Form):
    type = "OFT"
    kinds: ClassVar[tuple[type[Method], ...]] = (OFT,)
    names: ClassVar[tuple[tuple[str, str], ...]] = (
        ("oft_R.weight", "q"),
        ("oft_embedding_R.weight", "q"),
    )
    layers: ClassVar[tuple[type[maps.Map], ...]] = (maps.Linear, maps.Embedding)
    convs: ClassVar[tuple[int, ...]] = (2,)
    # it folds turned patches back into an image
    forgets: ClassVar[tuple[str, ...]] = ("groups", "kernel_size")
    bias: ClassVar[str | None] = "oft_only"

    def method(self, config: Config, layer: Layer, t: Tensors) -> OFT:
        terms = config.number("num_cayley_neumann_terms", 5)
        neumann = config.flag("use_cayley_neumann", True)
        if neumann and terms < 3:
            raise FileError(f"{config.path!r} has 'num_cayley_neumann_terms' as {terms}: below 3")
        if neumann and config.before(0, 18):
            raise FileError(
                f"{config.path!r} is of a peft before 0.18, whose 'use_cayley_neumann' was another "
                "series: train it anew"
            )
        eps = config.number("eps", 6e-5)
        found = size_of(t, "oft_R.weight", "oft_embedding_R.weight", dim=-1)
        block = _block(config, layer, found and (1 + math.isqrt(1 + 8 * found)) // 2)
        site, shares = layer.site, config.flag("block_share")
        shared = site.layout.neuron // block if shares and site else 1
        return OFT(
            block_size=block,
            neumann_terms=max(int(terms), 4) - 2 if neumann else None,
            # peft bounds all of a layer's blocks together, and one that is shared by itself
            eps=eps * math.sqrt(shared) if config.flag("coft") else None,
        )

    def settings(self, method: OFT, patch: Any) -> dict[str, Any]:
        _of_inputs(method)
        neumann = method.neumann_terms
        if neumann == 1:
            raise PeftliteError("peft has no OFT with neumann_terms=1, but from 2 up, and exact")
        return {
            "r": 0, "oft_block_size": patch.block, "use_cayley_neumann": neumann is not None,
            **({"num_cayley_neumann_terms": neumann + 2} if neumann else {}),
            **({"coft": True, "eps": method.eps} if method.eps else {}),
        }  # fmt: skip

    def parts(self, method: OFT, t: Tensors, layer: Layer) -> Parts:
        name, turned = self._turned(method.neumann_terms, layer)
        q = t.pop(name)
        if len(q) == 1:  # for all blocks
            q = q.expand(layer.site.layout.neuron // method.block_size, -1)
        return [(method, {"weight:q": -q if turned else q})]

    def theirs(self, patch: Any, layer: Layer) -> Tensors:
        name, turned = self._turned(patch.terms, layer)
        q = patch.q.detach()
        return {name: -q if turned else q}

    def _turned(self, terms: int | None, layer: Layer) -> tuple[str, bool]:
        """peft's name of q, and whether it turns the other way there."""
        # its series turns the other way than its exact map, and so does an embedding
        embeds = layer.site.layout.embeds
        name = "oft_embedding_R.weight" if embeds else "oft_R.weight"
        return name, (terms is not None) is not embeds


def _of_inputs(method: OFT | BOFT) -> None:
    if method.outputs:
        raise PeftliteError(f"peft has no {type(method).__name__} of a weight's outputs")


def _block(config: Config, layer: Layer, found: int | None) -> int:
    """The size of OFT's blocks, which has to be what the settings come to. Raises FileError."""
    count, size = config.number("r", 0), config.number("oft_block_size", 32)
    if bool(count) is bool(size):
        raise FileError(
            f"{config.path!r} has 'r' as {count:g} and 'oft_block_size' as {size:g}, of which peft "
            "takes one"
        )
    if layer.site is None:
        return found or 0
    n, says = layer.site.layout.neuron, count or size
    if n % says:  # peft takes the nearest that divides
        says = min((k for k in range(1, n + 1) if n % k == 0), key=lambda k: (abs(k - says), k))
    if found is None:
        return int(n // says if count else says)
    name, blocks = ("r", n // found) if count else ("oft_block_size", found)
    agreed(config, layer, name, says, blocks)
    return found


class BOFTForm(Form):
    type = "BOFT"
    kinds: ClassVar[tuple[type[Method], ...]] = (BOFT,)
    names: ClassVar[tuple[tuple[str, str], ...]] = (("boft_R", "q"), ("boft_s", "s"))
    convs: ClassVar[tuple[int, ...]] = (2,)
    forgets: ClassVar[tuple[str, ...]] = FIRST
    bias: ClassVar[str | None] = "boft_only"

    def method(self, config: Config, layer: Layer, t: Tensors) -> BOFT:
        size, count = config.number("boft_block_size", 4), config.number("boft_block_num", 0)
        factors = config.number("boft_n_butterfly_factor", 1)
        if not t:
            n = layer.site.layout.neuron
            if bool(size) is bool(count) or n % (size or count):
                raise FileError(
                    f"{config.path!r} has 'boft_block_size' as {size:g} and 'boft_block_num' as "
                    f"{count:g}: one of them is 0, and the other divides the {n} inputs of "
                    f"{layer.name}"
                )
            return BOFT(block_size=int(size or n // count), m=cast(int, factors))
        m, found, block, _ = t["boft_R"].shape
        if size:
            agreed(config, layer, "boft_block_size", size, block)
        if count:
            agreed(config, layer, "boft_block_num", count, found)
        if m > 1:  # peft has one factor where its extension for CUDA is missing
            agreed(config, layer, "boft_n_butterfly_factor", factors, m)
        return BOFT(block_size=block, m=m)

    def settings(self, method: BOFT, patch: Any) -> dict[str, Any]:
        _of_inputs(method)
        return {
            "boft_block_size": patch.block, "boft_block_num": 0,
            "boft_n_butterfly_factor": method.m,
        }  # fmt: skip

    def ours(self, t: Tensors, layer: Layer) -> Tensors:
        r, s = t.pop("boft_R"), t.pop("boft_s")
        s = fit(s, *((1, -1) if layer.ones else (-1, 1))).flatten()
        row, column = torch.triu_indices(r.shape[-2], r.shape[-1], 1).to(r.device)
        # peft learns a whole matrix for each skew one
        return {"q": ((r - r.mT) / 2)[..., row, column], "s": s}

    def theirs(self, patch: Any, layer: Layer) -> Tensors:
        s = patch.s.detach()
        return {
            "boft_R": skew(patch.q.detach(), patch.block),
            "boft_s": s[None] if layer.ones else s[:, None],
        }


class HRAForm(Form):
    type = "HRA"
    kinds: ClassVar[tuple[type[Method], ...]] = (HRA,)
    names: ClassVar[tuple[tuple[str, str], ...]] = (("hra_u", "u"),)
    convs: ClassVar[tuple[int, ...]] = (2,)
    forgets: ClassVar[tuple[str, ...]] = FIRST
    bias: ClassVar[str | None] = "hra_only"

    def method(self, config: Config, layer: Layer, t: Tensors) -> HRA:
        return HRA(
            rank=agreed(config, layer, "r", config.number("r", 8), size_of(t, "hra_u", dim=-1))
        )

    def settings(self, method: HRA, patch: Any) -> dict[str, Any]:
        return {"r": method.rank}

    def ours(self, t: Tensors, layer: Layer) -> Tensors:
        u = t.pop("hra_u")
        return {"u": (_orthonormal(u) if layer.orthogonal else u).mT}

    def theirs(self, patch: Any, layer: Layer) -> Tensors:
        return {"hra_u": patch.u.detach().mT}


def _orthonormal(u: Tensor) -> Tensor:
    """The columns of u (i, r) by Gram and Schmidt, step by step as peft has them.

    Of such, all reflections together are I − 2UUᵀ.
    """
    found: list[Tensor] = []
    for x in u.split(1, dim=1):
        for q in found:
            x = x - (q.mT @ x) * q
        found.append(x / x.norm())
    return torch.cat(found, dim=1)
