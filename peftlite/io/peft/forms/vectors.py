"""(IA)³ and BEFT in PEFT: vectors that scale a layer's outputs or inputs, or shift them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from peftlite.core import maps
from peftlite.core.patch import Method
from peftlite.io.peft.config import Config
from peftlite.io.peft.form import Form, Layer, Parts, Tensors, fit
from peftlite.methods.bitfit import BitFit
from peftlite.methods.ia3 import IA3


class IA3Form(Form):
    type = "IA3"
    kinds: ClassVar[tuple[type[Method], ...]] = (IA3,)
    names: ClassVar[tuple[tuple[str, str], ...]] = (("ia3_l", "l"),)
    layers: ClassVar[tuple[type[maps.Map], ...]] = (maps.Linear, maps.TransposedLinear)
    convs: ClassVar[tuple[int, ...]] = (2, 3)
    forgets: ClassVar[tuple[str, ...]] = ()

    def method(self, config: Config, layer: Layer, t: Tensors) -> IA3:
        named = config.take("feedforward_modules", [], list, str)
        if isinstance(named, str):
            return IA3(feedforward=config.matches("feedforward_modules", named, layer.path))
        return IA3(feedforward=layer.path.endswith(tuple(config.names("feedforward_modules"))))

    def settings(self, method: IA3, patch: Any) -> dict[str, Any]:
        return {"feedforward": method.feedforward}

    def joined(self, settings: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        inputs = sorted(path for path, its in settings.items() if its["feedforward"])
        return {"feedforward_modules": inputs}

    def parts(self, method: IA3, t: Tensors, layer: Layer) -> Parts:
        scale, inputs, ones = t.pop("ia3_l"), method.feedforward, layer.ones
        shape = (1, -1, *ones) if ones or inputs else (-1, 1)
        found: dict[str, Tensor | None] = {"weight:l": fit(scale, *shape).flatten()}
        if not inputs and getattr(layer.site.module, "bias", None) is not None:
            found["bias:l"] = None
        return [(method, found)]

    def theirs(self, patch: Any, layer: Layer) -> Tensors:
        scale, ones = patch.l.detach(), layer.ones
        return {"ia3_l": scale.reshape(1, -1, *ones) if ones or patch.inputs else scale[:, None]}


class BEFTForm(Form):
    type = "BEFT"
    kinds: ClassVar[tuple[type[Method], ...]] = ()
    names: ClassVar[tuple[tuple[str, str], ...]] = (("beft_bias", "difference"),)

    def method(self, config: Config, layer: Layer, t: Tensors) -> BitFit:
        return BitFit()

    def parts(self, method: BitFit, t: Tensors, layer: Layer) -> Parts:
        d = t.pop("beft_bias")
        return [added_bias(layer.site.module, fit(d, 1, -1)[0])]


def added_bias(module: nn.Module, d: Tensor) -> tuple[Method, dict[str, Tensor | None]]:
    """A change of a layer's bias, or the bias that it lacks."""
    if getattr(module, "bias", None) is not None:
        return BitFit(), {"bias:difference": d}
    return BitFit(add_missing=True), {"():d": d}
