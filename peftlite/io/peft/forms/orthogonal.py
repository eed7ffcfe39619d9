"""OFT, BOFT and HRA in PEFT: rotations and reflections of a weight."""

from __future__ import annotations

import math
from typing import Any

import torch

from peftlite.errors import FileError, PeftliteError
from peftlite.io.peft.config import Config
from peftlite.io.peft.form import Form, Layer, Parts, Tensors, fit
from peftlite.methods.boft import BOFT
from peftlite.methods.hra import HRA
from peftlite.methods.oft import OFT, skew

# of a stride and a padding they take the first number
FIRST = ("padding_mode", "dilation", "groups", "stride", "padding")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])


class OFTForm(Form):
    type = "OFT"
    kinds = (OFT,)
    names = (("oft_R.weight", "q"),)
    convs = (2,)
    forgets = ("kernel_size",)  # it folds turned patches back into an image
    bias = "oft_only"

    def method(self, config: Config, layer: Layer, t: Tensors) -> OFT:
        terms = config.number("num_cayley_neumann_terms", 5)
        neumann = config.flag("use_cayley_neumann", True)
        if neumann and terms < 3:
            raise FileError(f"{config.path!r} has 'num_cayley_neumann_terms' as {terms}: below 3")
        if neumann and _release(config.take("peft_version", "", str)) < (0, 18):
            raise FileError(
                f"{config.path!r} is of a peft before 0.18, whose 'use_cayley_neumann' was another "
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

    def parts(self, method: OFT, t: Tensors, layer: Layer) -> Parts:
        # peft's series turns the other way than its exact map
        q = t.pop("oft_R.weight")
        return [(method, {"weight:q": q if method.neumann_terms is None else -q})]

    def theirs(self, patch: Any, layer: Layer) -> Tensors:
        q = patch.q.detach()
        return {"oft_R.weight": q if patch.terms is None else -q}


class BOFTForm(Form):
    type = "BOFT"
    kinds = (BOFT,)
    names = (("boft_R", "q"), ("boft_s", "s"))
    convs = (2,)
    forgets = FIRST
    bias = "boft_only"

    def method(self, config: Config, layer: Layer, t: Tensors) -> BOFT:
        m, _, block, _ = t["boft_R"].shape
        return BOFT(block_size=block, m=m)

    def settings(self, method: BOFT, patch: Any) -> dict[str, Any]:
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
    kinds = (HRA,)
    names = (("hra_u", "u"),)
    convs = (2,)
    forgets = FIRST
    bias = "hra_only"

    def method(self, config: Config, layer: Layer, t: Tensors) -> HRA:
        return HRA(rank=t["hra_u"].shape[-1])

    def settings(self, method: HRA, patch: Any) -> dict[str, Any]:
        return {"r": method.rank}

    def ours(self, t: Tensors, layer: Layer) -> Tensors:
        return {"u": t.pop("hra_u").mT}

    def theirs(self, patch: Any, layer: Layer) -> Tensors:
        return {"hra_u": patch.u.detach().mT}
