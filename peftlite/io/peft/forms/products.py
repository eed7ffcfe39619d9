"""LoHa and LoKr in PEFT: elementwise and Kronecker products of factors."""

from __future__ import annotations

from typing import Any

from peftlite.errors import PeftliteError
from peftlite.io.peft.config import Config
from peftlite.io.peft.form import At, Form, Tensors, fit
from peftlite.methods.loha import LoHa
from peftlite.methods.lokr import LoKr


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
