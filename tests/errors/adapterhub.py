"""The errors of AdapterHub's folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import peftlite as pl
from tests.errors.case import Case, linears

LORA = {"architecture": "lora", "r": 2, "alpha": 4}
SCALE = {**LORA, "composition_mode": "scale"}
REFT = {"architecture": "reft", "prefix_positions": 2, "tied_weights": True}
UNIT = {
    f"0.reft_layer.refts.a.units.0.{name}": torch.ones(shape)
    for name, shape in (
        ("learned_source.weight", (2, 4)),
        ("learned_source.bias", (2,)),
        ("projection.weight", (2, 4)),
    )
}
PREFIX = {"architecture": "prefix_tuning", "flat": True, "prefix_length": 2}
POOL = {"0.prefix_tunings.a.self_prefix.control_trans": torch.ones(8)}
SIZES = {"reduction_factor": 2, "non_linearity": "relu"}


def ones(*shapes: tuple[int, ...], names: str = "lora_A lora_B", at: str = "0.loras") -> dict:
    pairs = zip(names.split(), shapes, strict=True)
    return {f"{at}.a.{name}": torch.ones(shape) for name, shape in pairs}


BOTTLENECK = ones(
    *((2, 4), (2,), (4, 2), (4,)),
    names="adapter_down.0.weight adapter_down.0.bias adapter_up.weight adapter_up.bias",
    at="0.adapters",
)


def folder(
    says: str,
    config: Any,
    tensors: dict[str, Tensor],
    head: str = "",
    other: bool = False,
    kind: str = "bert",
) -> Case:
    def write(path: Path) -> None:
        path.mkdir()
        said = {"config": config, "name": "a", "model_type": kind, "version": "adapters.1.3.0"}
        (path / "adapter_config.json").write_text(json.dumps(said))
        safetensors.torch.save_file(tensors, path / "adapter.safetensors")
        if head:
            (path / "head_config.json").write_text(json.dumps({"model_class": head}))
            safetensors.torch.save_file({"9.bias": torch.ones(2)}, path / "model_head.safetensors")

    start = "" if other else "is of AdapterHub's adapters, and "
    return Case(pl.load, f"'…/adapter_config.json' {start}{says}", pl.FileError, linears, write)


CASES: list[Case | Callable[[], Case]] = [
    folder(
        "has the architecture 'union', which can't be read; these can: lora, bottleneck, "
        "prefix_tuning, reft; where it changes weights, model.merge_adapter there, and pl.extract "
        "makes a delta of the model before and after",
        {"architecture": "union"},
        BOTTLENECK,
    ),
    folder(
        "has 0.loras.b.lora_A in its tensors, which can't be read",
        LORA,
        {"0.loras.b.lora_A": torch.ones(2, 4)},
    ),
    folder(
        "the pool of prefixes can't be: it has 0.gates.a.weight in its tensors, which can't be "
        "read",
        PREFIX,
        POOL | {"0.gates.a.weight": torch.ones(1)},
    ),
    folder(
        "the pool of prefixes can't be: it has 1.pool.prefix_tunings.a.self_prefix.control_trans "
        "beside another 0.prefix_tunings.a.self_prefix.control_trans",
        PREFIX,
        POOL | {"1.pool.prefix_tunings.a.self_prefix.control_trans": torch.zeros(8)},
    ),
    folder("its self_prefix is of attention that this model hasn't", PREFIX, POOL),
    folder(
        "its prefixes are for a model of the type 't5', where adapters computes another "
        "attention: these can be read: bert, …",
        PREFIX,
        POOL,
        kind="t5",
    ),
    folder("0 can't be: alpha must be …", {**LORA, "alpha": -1}, ones((2, 4), (4, 2))),
    folder(
        "a module has gate.weight, beside gate.weight; lora_A; lora_B",
        LORA,
        ones((2, 4), (4, 2)) | {"0.loras.a.gate.weight": torch.ones(1, 4)},
    ),
    folder("a module lacks lora_B, beside lora_A", LORA, ones((2, 4), names="lora_A")),
    folder("this model lacks 9.weight", LORA, ones((2, 4), (4, 2), at="9.loras")),
    folder("has 'r' as 2, and 0 has 3", LORA, ones((3, 4), (4, 3))),
    folder("0 has 8 outputs, of 4 in this model", LORA, ones((4, 4), (8, 2))),
    folder(
        "0 has 'alpha' as 4, which scales what has no scale",
        {**SCALE, "attn_matrices": ["q"]},
        ones((2, 1), names="lora_B"),
    ),
    folder(
        "has 'reduction_factor' as 4, and 0 2 of 4", {**SIZES, "reduction_factor": 4}, BOTTLENECK
    ),
    folder("0 can't be: … by zero", {**SIZES, "reduction_factor": 0}, BOTTLENECK),
    folder(
        "has 'gelu_new' as its non_linearity: here are relu, gelu, tanh, swish, silu",
        {**SIZES, "non_linearity": "gelu_new"},
        BOTTLENECK,
    ),
    folder(
        "what it reads and changes at 0 is no call of this model, with its model_type 'bert', "
        "is_parallel, original_ln_before, original_ln_after and residual_before_ln",
        SIZES,
        BOTTLENECK,
    ),
    folder(
        "0.reft_layer can't be: in a model of the type 't5' adapters counts positions otherwise; "
        "these can be read: bert, …",
        REFT,
        UNIT,
        kind="t5",
    ),
    folder(
        "0.reft_layer can't be: its first positions have another intervention than its last, and "
        "here they have the same: 'tied_weights', 'prefix_positions' or 'suffix_positions' alone",
        {**REFT, "tied_weights": False, "suffix_positions": 1},
        UNIT,
    ),
    folder(
        "0.reft_layer can't be: a NoReFT and a DiReFT are saved alike, and adapters itself loads "
        'both as NoReFT: add to "config" in that file "subtract_projection": true if it is a '
        "NoReFT, false if it is a DiReFT",
        REFT,
        UNIT,
    ),
    folder("has 'r' as 1, and 0.reft_layer 2 of 4", {**REFT, "subtract_projection": True}, UNIT),
    folder(
        "is a lora with 'use_dora' as True, which may change the model in a way that peftlite "
        "doesn't have",
        {**LORA, "use_dora": True},
        ones((2, 4), (4, 2)),
        other=True,
    ),
    folder(
        "beside it is the head of a BertAdapterModel, and this is a Sequential: load it into "
        "the bare model, or take head_config.json and its tensors out of the folder",
        LORA,
        ones((2, 4), (4, 2)),
        "BertAdapterModel",
    ),
]
