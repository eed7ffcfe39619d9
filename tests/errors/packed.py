"""The errors of bases in codes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.core.tensors import raw
from peftlite.io.files import locking
from peftlite.quant import keys
from peftlite.quant.packing import pack
from tests.errors.case import Case, linears
from tests.packed.doubles import Linear4bit, QuantLinear


@torch.no_grad()
def infinite() -> nn.Module:
    model = linears()
    model[1].weight[0, 0] = torch.inf
    return model


def packed() -> nn.Module:
    model = linears()
    pl.quantize(model, targets="0")
    return model


def starting(model: nn.Module, _: Path) -> None:
    pl.attach(model, pl.LoRA(rank=2, init="lora_ga", targets="0"), "sql")
    try:
        pl.initialize(model, "sql", [torch.zeros(1, 4)], loss=lambda model, x: model(x).sum())
    finally:
        pl.detach(model, "sql")


def spread() -> nn.Module:
    model = packed()
    model[0]._parameters["weight"].placements = ("Shard",)
    return model


def with_lora() -> nn.Module:
    model = packed()
    pl.attach(model, pl.LoRA(rank=2, targets="0"), "sql")
    return model


STATE = "quant_state.bitsandbytes__nf4"


def bad(key: str, value: Tensor | None) -> dict[str, Tensor]:
    """A packed model's entries, with one in place of another; without it, where it's None."""
    entries = {**packed().state_dict(), f"0.weight.{key}": value}
    return {key: value for key, value in entries.items() if value is not None}


def rewritten(old: bytes, new: bytes) -> dict[str, Tensor]:
    text = bytes(packed().state_dict()[f"0.weight.{STATE}"].tolist()).replace(old, new)
    return bad(STATE, torch.tensor([*text], dtype=torch.uint8))


def quantizing(**how: object):
    return lambda model, _: pl.quantize(model, **how)


def writing(model: nn.Module, _: Path) -> None:
    with torch.no_grad():
        model[0].weight.zero_()


def assigning(model: nn.Module, _: Path) -> None:
    model[0].weight = nn.Parameter(torch.zeros(4, 4))


def reading(entries: dict[str, Tensor]) -> Callable[[nn.Module, Path], object]:
    of_0 = {k.removeprefix("0.weight").lstrip("."): v for k, v in entries.items() if "0.w" in k}
    return lambda _, __: keys.read(of_0)


def merging(model: nn.Module, _: Path) -> None:
    pl.merge(model, "sql", requantize=False)


def taking(model: nn.Module, _: Path) -> None:
    other = linears()
    pl.quantize(other, "int8", targets="0")
    model[0]._take("weight", keys.written(*_own(other)))


def taking_nan(model: nn.Module, _: Path) -> None:
    model[0]._take("weight", {"": torch.full((4, 4), torch.nan)})


def _own(model: nn.Module):
    w = raw(model[0], "weight")
    return w.packing, w.parts


def filling(model: nn.Module, path: Path) -> None:
    pl.quantize(model, checkpoint=path)


def holding(tensors: dict[str, Tensor | None] | None = None) -> Callable[[Path], None]:
    """A file of a packed model, with some tensors in place of its own; without those of None."""
    entries = {**packed().state_dict(), **(tensors or {})}
    kept = {key: tensor for key, tensor in entries.items() if tensor is not None}
    return lambda path: safetensors.torch.save_file(kept, path)


def tied() -> nn.Module:
    model = linears()
    model[1].weight = model[0].weight
    return model


def with_tables() -> nn.Module:
    model = linears()
    table = torch.empty(4, device="meta")
    model[1].register_buffer("table", table, persistent=False)
    return model


def packing_files(model: nn.Module, path: Path) -> None:
    pl.quantize_files(path, path.with_name("out"), targets="0")


def busy(path: Path) -> None:
    """A file to pack, and a process that does so."""
    plain(path)
    folder = path.with_name(".out.part")
    folder.mkdir()
    LOCKS.append(locking(folder))
    LOCKS[-1].__enter__()


def plain(path: Path) -> None:
    safetensors.torch.save_file(linears().state_dict(), path)


def taken(path: Path) -> None:
    plain(path)
    path.with_name("out").write_text("mine")


def with_nan(path: Path) -> None:
    state = linears().state_dict()
    state["0.weight"][0, 0] = torch.nan
    safetensors.torch.save_file(state, path)


def of_others(**tensors: Tensor) -> Callable[[Path], None]:
    """A file in which the first weight is packed by another library."""
    state = {key: t for key, t in linears().state_dict().items() if key != "0.weight"}
    given = {f"0.{name}": tensor for name, tensor in tensors.items()}
    return lambda path: safetensors.torch.save_file({**state, **given}, path)


def packing_as_read(model: nn.Module, path: Path) -> None:
    pack(torch.zeros(4, 4), "fp4")


def rewritten4() -> nn.Module:
    layer = Linear4bit(torch.ones(4, 4))
    layer._parameters["weight"].quant_state.packing_format_for_cpu = True
    return nn.Sequential(layer)


def unknown() -> nn.Module:
    return nn.Sequential(QuantLinear({"qweight": WORDS}, torch.zeros(4, 4)))


def misshapen() -> nn.Module:
    return nn.Sequential(QuantLinear({**GPTQ, "scales": torch.ones(3, 4)}, torch.zeros(4, 4)))


def plain_attach(model: nn.Module, _: Path) -> None:
    pl.attach(model, pl.LoRA(rank=2))


def _empty() -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(0, 4))
    return module


LOCKS: list[Any] = []
WORDS = torch.zeros(4, 1, dtype=torch.int32)
GPTQ = {"qweight": torch.zeros(1, 4).int(), "qzeros": torch.zeros(1, 1).int(),
        "scales": torch.ones(1, 4)}  # fmt: skip
ATTACHED = "'sql' is attached, and knows its base by the very numbers: pl.detach it first"
NAMES = "'absmax', 'nested_absmax', 'nested_quant_map', 'quant_map'"
UNREAD = "has a 'quant_state.bitsandbytes__nf4' that can't be read: …"

CASES = [
    Case(quantizing(kind="nf5"), "kind must be one of 'nf4', 'int8', 'fp8', not 'nf5'",
         model=linears),
    Case(quantizing(init="svd"), "init must be one of 'loftq', 'pissa', not 'svd'", model=linears),
    Case(quantizing(iterations=0), "iterations must be a whole number from 1 up, not 0",
         model=linears),
    Case(quantizing(double_quant="yes"), "double_quant must be one of True, False, not 'yes'",
         model=linears),
    Case(quantizing(kind="int8", scales="search"), "scales would change nothing, as int8 has one "
         "scale a row, in fp32: leave it out", model=linears),
    Case(quantizing(init="pissa"), "init would change nothing, as rank is 0: leave it out",
         model=linears),
    Case(starting, "0.weight is packed, and init='lora_ga' goes by a gradient, which codes have "
         "none of: take another init, such as 'eva'", model=packed),
    Case(quantizing(), ATTACHED),
    Case(quantizing(kind="int8", checkpoint="x"), "a checkpoint says what is packed, and how: give "
         "it alone", model=linears),
    Case(filling, "0.weight is packed or sharded already: take a plain model", model=packed,
         file=holding()),
    Case(filling, "1.table is a buffer on the meta device that no checkpoint holds: build the "
         "model so that parameters alone are there, as within accelerate.init_empty_weights()",
         model=with_tables, file=holding()),
    Case(filling, "… lacks 1 of the model's tensors: 1.weight; it has such as 0.bias; 0.weight",
         pl.FileError, model=linears, file=holding({"1.weight": None})),
    Case(filling, "… has 1 tensors that the model lacks: 2.weight", pl.FileError, model=linears,
         file=holding({"2.weight": torch.zeros(4, 4)})),
    Case(filling, "the model ties 1.weight to 0.weight, which the file has otherwise", pl.FileError,
         model=tied, file=holding()),
    Case(filling, f"0.weight is of no packing that is known here: beside its codes are [{NAMES}]",
         pl.FileError, model=linears, file=holding({f"0.weight.{STATE}": None})),
    Case(filling, "0.weight is of no packing that is known here: beside its codes are "
         "['weight_packed', 'weight_scale']", pl.FileError, model=linears,
         file=of_others(weight_packed=WORDS, weight_scale=torch.ones(4, 1))),
    Case(filling, "0.weight has parts of {…}, which don't make (4, 4) by gptq-8", pl.FileError,
         model=linears, file=of_others(**{**GPTQ, "scales": torch.ones(3, 4)})),
    Case(filling, "0.weight has parts of {…}, which don't make (4, 4) by gptq-8", pl.FileError,
         model=linears, file=of_others(**GPTQ, g_idx=torch.full((4,), 9))),
    Case(plain_attach, "a weight of bitsandbytes was rewritten as it ran in eval mode on a CPU, "
         "and gives no gradient: load the model again, and attach before it runs",
         model=rewritten4),
    Case(plain_attach, "the weight of a QuantLinear is of no packing that is known here: it has "
         "['qweight']", model=unknown),
    Case(plain_attach, "LoRA takes none of this model's sites by default; 0.weight has parts "
         "of {…}, which don't make (4, 4) by gptq-8", pl.TargetError, model=misshapen),
    Case(packing_as_read, "a weight in fp4 is read here, and not written: keep what would change "
         "it attached", model=linears),
    Case(packing_files, "… is packed already: it has 0.weight.quant_state…", pl.FileError,
         model=linears, file=holding()),
    Case(packing_files, "0.weight has numbers that aren't finite", model=linears, file=with_nan),
    Case(packing_files, "can't write …: it is there already; name a new one", pl.FileError,
         model=linears, file=taken),
    Case(packing_files, "can't write …: another process is at it", pl.FileError, model=linears,
         file=busy),
    Case(lambda _, path: pl.quantize_files(path, path.with_name("out"), "nf4", block=48),
         "block must be one of …", model=linears, file=plain),
    Case(lambda _, path: pl.quantize_files(path, path.with_name("out"), targets="0.bias"),
         "0.bias is torch.float32 of (4,); quantize takes tensors of two or more dimensions, of "
         "floats in 16 bits or more", pl.TargetError, model=linears, file=plain),
    Case(filling, "1.weight has shape (2, 4) in the file, and (4, 4) in the model", pl.FileError,
         model=linears, file=holding({"1.weight": torch.zeros(2, 4)})),
    Case(lambda model, _: pl.dequantize(model), ATTACHED, model=with_lora),
    Case(lambda model, _: pl.dequantize(model), "'weight' isn't here whole: dequantise before it "
         "is sharded", model=spread),
    Case(quantizing(targets="0"), "0.weight is packed already, as nf4: skip it", model=packed),
    Case(quantizing(targets="0.bias"), "0.bias is torch.float32 of (4,); quantize takes tensors of "
         "two or more dimensions, of floats in 16 bits or more", pl.TargetError, model=linears),
    Case(quantizing(targets="*"), "0.weight isn't here whole: quantise before it is sharded",
         model=lambda: linears(device="meta")),
    Case(quantizing(targets="*"), "1.weight has numbers that aren't finite", model=infinite),
    Case(merging, "0.weight is packed, and merging packs it again: requantize=True allows that, or "
         "keep the delta attached", model=with_lora),
    Case(writing, "zero_ writes, or lets write, into a tensor that is kept in nf4, whose codes it "
         "wouldn't reach: pl.dequantize first; to look at the value, use .detach()", model=packed),
    Case(assigning, "'weight' of a Linear is packed, and no tensor can be put in its place: "
         "pl.dequantize the model first", model=packed),
    Case(taking, "is Packing(kind='int8', …) of ['', 'scale'], where here is Packing(kind='nf4', …",
         model=packed),
    Case(taking_nan, "has numbers that aren't finite", model=packed),
    Case(lambda model, _: model[0]._take("weight", {"": "x"}), "has entries that are no tensors",
         model=packed),
    Case(reading(bad("absmax", torch.zeros(1))), "has absmax in torch.float32, where torch.uint8 "
         "is known here: a packed tensor can't be cast"),
    Case(quantizing(targets="1.weight"), "1.weight is torch.float32 of (0, 4); …", pl.TargetError,
         model=lambda: nn.Sequential(nn.Linear(4, 4), _empty())),
    Case(reading(bad(STATE, None)), "is of no packing that is known here: beside its codes are "
         f"[{NAMES}]"),
    Case(reading(rewritten(b'"nf4"', b'"fp4"')), UNREAD),
    Case(reading(rewritten(b": 256", b": 128")), UNREAD),
    Case(reading(bad("quant_map", torch.zeros(16))), "has a 'quant_map' of its own, which isn't "
         "the one of nf4"),
    Case(reading(bad("absmax", torch.zeros(2))), "has parts of …, where (4, 4) has …"),
]  # fmt: skip
