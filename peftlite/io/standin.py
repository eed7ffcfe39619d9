"""Stand-in: a checkpoint's tensors in modules of the right kinds, without the model's code.

Patches ask of the module around a tensor what kind of map it is and how many groups it has. A
delta's file tells that of every tensor that it changes, and what other names the tensor has:

    {"layers.0.q.weight": {"module": "Linear"},
     "conv.weight": {"module": "Conv2d", "groups": 2},
     "embed.weight": {"module": "Embedding", "names": ["lm_head.weight"]}}

Of any other tensor the kind is guessed, by its shape and its module's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peftlite.core import maps
from peftlite.core.host import base_class
from peftlite.core.site import Site, whole_address
from peftlite.errors import TargetError
from peftlite.table import listed


class Conv1D(nn.Module):
    """The linear map of transformers whose weight is (i, o): known, as theirs, by its forward."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D.forward.__module__ = "transformers.pytorch_utils"

_KINDS: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.MultiheadAttention,
    nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell, nn.LayerNorm, nn.RMSNorm,
    Conv1D, nn.Module,
)  # fmt: skip
KINDS = {kind.__name__: kind for kind in _KINDS}

_EMBEDDING = re.compile(r".*emb.*|wte|wpe|shared", re.I)
_BY_DIMENSIONS = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def describe(site: Site) -> dict[str, Any]:
    """What a file says of the module around a tensor."""
    module = site.module
    kind = next(k for k in base_class(module).__mro__ if KINDS.get(k.__name__) is k)
    if maps.kind_of(module) is maps.TransposedLinear:
        kind = Conv1D
    groups = getattr(module, "groups", 1) if issubclass(kind, nn.modules.conv._ConvNd) else 1
    _, *others = dict.fromkeys(map(whole_address, (site.address, *site.names)))
    return {
        "module": kind.__name__,
        **({"groups": groups} if groups > 1 else {}),
        **({"names": others} if others else {}),
    }


def is_sound(its: Any) -> bool:
    """Whether what a file says of a module can be."""
    if not isinstance(its, dict) or not {*its} <= {"module", "groups", "names"}:
        return False
    groups, names = its.get("groups", 2), its.get("names", [""])
    return (
        isinstance(its.get("module"), str)
        and its["module"] in KINDS
        and type(groups) is int
        and groups > 1
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
    )


def compare(its: Mapping[str, Any] | None, site: Site) -> None:
    """Raises TargetError if a file has a weight tied otherwise, or in another order, than a model.

    A tied tensor has both orders, and goes by its first owner wherever that matters.
    """
    if its is None:
        return
    address, *others = dict.fromkeys(map(whole_address, (site.address, *site.names)))
    if {*others} ^ {*its.get("names", ())}:
        here, there = listed(sorted(others)) or "nothing", listed(its.get("names", ())) or "nothing"
        raise TargetError(
            f"{address} is tied to {here}, and was tied to {there} where the delta was made"
        )
    if site.slot != "weight" or len(site.owners) > 1:
        return
    module = nn.Module()
    _become(module, its)
    if maps.is_transposed(module) is not site.layout.transposed:
        orders = ["(outputs, inputs)", "(inputs, outputs)"]
        raise TargetError(
            f"{site.address} is stored as {orders[site.layout.transposed]}, and was as "
            f"{orders[not site.layout.transposed]}, in a {its['module']}, where the delta was made"
        )


def stand_in(
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, Mapping[str, Any]],
    transposed: bool = False,
) -> nn.Module:
    """A model of the tensors, for all that needs no call of it.

    Args:
        modules: what is known of the modules, by a tensor's address.
        transposed: whether an unknown matrix is (i, o), as in the GPT-2 of transformers.
    """
    known = {address.rpartition(".")[0]: its for address, its in modules.items()}
    root = nn.Module()
    for name, parameter in _parameters(tensors, modules).items():
        path, _, slot = name.rpartition(".")
        module = _submodule(root, path)
        its = known.get(path) or {"module": _guess(path, slot, parameter, transposed)}
        if its["module"] != "Module":
            _become(module, its)
        module._parameters[slot] = parameter
        if slot == "weight":
            module._parameters.setdefault("bias", None)
            module.kernel_size = parameter.shape[2:]
    return root.eval()


def _parameters(
    tensors: Mapping[str, Tensor], modules: Mapping[str, Mapping[str, Any]]
) -> dict[str, nn.Parameter]:
    """The parameters by every name, those that a delta changes first and by the name it knows."""
    given = {name: nn.Parameter(t, requires_grad=False) for name, t in tensors.items()}
    found: dict[str, nn.Parameter] = {}
    for address, its in modules.items():  # first, as a patch goes by the first of a tensor's owners
        names = [address, *its.get("names", ())]
        for name in names:
            if own := [given[n] for n in (name, *names) if n in given]:
                found[name] = own[0]
    return found | {name: parameter for name, parameter in given.items() if name not in found}


def _submodule(root: nn.Module, path: str) -> nn.Module:
    """The module at a path, made where there is none yet."""
    module = root
    for step in path.split(".") if path else ():
        inner = module._modules.get(step)
        if inner is None:
            inner = module._modules[step] = nn.Module()
        module = inner
    return module


def embeds(name: str) -> bool:
    """Whether a tensor's name is one of an embedding's weights."""
    path, _, slot = name.rpartition(".")
    return slot == "weight" and bool(_EMBEDDING.fullmatch(path.rpartition(".")[2]))


def _guess(path: str, slot: str, tensor: Tensor, transposed: bool) -> str:
    if slot != "weight" or not tensor.is_floating_point():
        return "Module"
    kind = _BY_DIMENSIONS.get(tensor.dim(), nn.Module)
    if kind is nn.Linear:
        kind = nn.Embedding if embeds(f"{path}.{slot}") else Conv1D if transposed else kind
    return kind.__name__


def _become(module: nn.Module, its: Mapping[str, Any]) -> None:
    """Makes an empty module one of a kind, with what is asked of such a one."""
    module.__class__ = KINDS[its["module"]]
    module.groups = its.get("groups", 1)
    module.max_norm, module.scale_grad_by_freq = None, False
