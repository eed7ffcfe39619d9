"""The errors of peers' files of one list of tensors."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.io.convert import convert
from tests.errors.case import Case, attached, delta, linears
from tests.errors.load import good
from tests.errors.peft_files import exporting


def peers(keys: dict[str, Tensor], **metadata: str) -> Callable[[Path], None]:
    return lambda path: safetensors.torch.save_file(keys, path, metadata or None)


def pair(at: str = "lycoris_0.lora_down.weight lycoris_0.lora_up.weight", rank: int = 2) -> dict:
    a, b = at.split()
    return {a: torch.ones(rank, 4), b: torch.ones(4, rank)}


def peer_file(keys: dict[str, Tensor], of: str, says: str, **metadata: str) -> Case:
    says = f"'…' is of {of}, and {says}"
    return Case(pl.load, says, pl.FileError, linears, peers(keys, **metadata))


def converting(says: str, file: Callable[[Path], Any] | None, **how: Any) -> Case:
    kind = pl.FileError if says.startswith("'…'") else pl.PeftliteError
    return Case(lambda model, path: convert(path, path, **how), says, kind, linears, file)


def endless(path: Path) -> None:
    itself: dict[str, Any] = {}
    itself["a"] = itself
    torch.save(itself, path)


def squeezed(path: Path) -> None:
    """An archive whose parts are compressed, as torch's never are."""
    torch.save({"a": torch.zeros(256_000)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for part, data in parts.items():
            archive.writestr(part, data)


MLX = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 20.0}}


def mlx_folder(says: str, **its: Any) -> Case:
    def write(path: Path) -> None:
        path.mkdir()
        tensors = {f"layers.{n}.q.lora_{x}": torch.ones(2, 2) for n in (0, 1) for x in "ab"}
        safetensors.torch.save_file(tensors, path / "adapters.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(MLX | its))

    return Case(pl.load, f"'…/adapter_config.json' {says}", pl.FileError, linears, write)


def into_kohya(method: Any, model: nn.Module, why: str, format: Any = "kohya") -> Case:
    says = (
        f"… can't go into a file of {format}, since {why}: leave it out with exclude=, or keep the "
        "delta with pl.save"
    )
    return exporting(method, says, lambda: model, format=format)


def twins() -> nn.Module:
    model = linears()
    model[1].weight = model[0].weight
    return model


def namesakes() -> nn.Module:
    return nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(4, 4)}), "a_b": nn.Linear(4, 4)})


def no_number() -> nn.Module:
    model = attached(linears(), pl.LoRA())()
    next(delta(model).parameters()).data[0, 0] = torch.nan
    return model


LORALIB = pair("0.lora_A 0.lora_B")
FUSED = {"0.lora_A": torch.ones(2, 4), "0.lora_B": torch.ones(4, 1)}
SETTINGS_OF = "lora_adapter_metadata"
WHOLE = "there it has whole weights of linear layers and convolutions"

MERGE = "merge it there, and pl.extract makes a delta of the model before and after"

CASES = [
    peer_file(pair() | {"lycoris_0.scalar": torch.ones(1)}, "kohya", "has lycoris_0.scalar, which "
              "can't be read"),
    peer_file(pair("0.lora.down.weight 0.lora.up.weight") | pair("0.lora_A.weight 0.lora_B.weight"),
              "diffusers", "has 0.lora_A.weight beside 0.lora.down.weight"),
    peer_file({"lycoris_0.lora_down.weight": torch.ones(2, 4)}, "kohya", "lycoris_0 has no "
              "lora_up.weight"),
    peer_file(pair() | {"lycoris_0.hada_w1_a": torch.ones(4, 2)}, "kohya", "lycoris_0 has "
              "hada_w1_a, lora_down.weight, lora_up.weight: together these are no method here"),
    peer_file({"lycoris_0.a1.weight": torch.zeros(2, 2)}, "kohya", "lycoris_0 is by GLoRA, which "
              "no method here is: " + MERGE),
    peer_file({"lycoris_0.oft_blocks": torch.zeros(2, 2, 2)}, "kohya", "lycoris_0 can't be: it has "
              "no alpha, which bounds its rotation"),
    peer_file({"lycoris_0.on_input": torch.tensor(0), "lycoris_0.diff": torch.ones(4, 4),
               "lycoris_0.alpha": torch.ones(1)}, "kohya", "lycoris_0 has alpha beside on_input, "
              "which can't be read"),
    peer_file(pair() | {"lycoris_0.dora_scale": torch.ones(1, 4)}, "kohya", "lycoris_0 is by DoRA "
              "with a norm for every input (wd_on_output=False), and here DoRA has one for every "
              "output: " + MERGE),
    Case(pl.load, "'…' is of kohya, and changes 0 apart from 1, and this model ties them: untie "
         "them first, model.0.weight = …", pl.FileError, lambda: twins(), peers(pair())),
    Case(pl.load, "'…' is of torchtune, and 0 is an embedding by DoRA with a norm for every row, "
         "and here DoRA has one for every column: " + MERGE, pl.FileError,
         lambda: nn.Sequential(nn.Embedding(4, 4)), peers(pair("0.lora_a.weight 0.lora_b.weight")
                                                        | {"0.magnitude": torch.ones(4)})),
    Case(pl.load, "'…' is of kohya, and has lycoris_1.diff_b, and 1.weight has no bias beside it",
         pl.FileError, lambda: linears(bias=False), peers({"lycoris_1.diff_b": torch.ones(4)})),
    peer_file(pair() | {"lycoris_0.alpha": torch.tensor(-1.0)}, "kohya", "lycoris_0 can't be: "
              "alpha must be finite and above 0, not -1.0"),
    peer_file(pair("a.lora_A.weight a.lora_B.weight") | pair("1.lora_A.weight 1.lora_B.weight"),
              "diffusers", "of its 2 modules this model lacks 1: a; nearest to the first: "),
    Case(pl.load, "'…' is of kohya, and lycoris_a_b may be a.b or a_b in this model: rename one of "
         "them to load it", pl.FileError, namesakes,
         peers(pair("lycoris_a_b.lora_down.weight lycoris_a_b.lora_up.weight"))),
    peer_file(pair("0.lora_A.weight 0.lora_B.weight"), "diffusers", "0 can't be: its base isn't "
              "the model's own, being trained with olora", **{SETTINGS_OF: json.dumps({
                  "r": 2, "lora_alpha": 2, "init_lora_weights": "olora"})}),
    peer_file(LORALIB, "loralib", "such files don't say α: say it once, with peftlite convert '…' "
              "NEW --alpha NUMBER"),
    peer_file(FUSED, "loralib", "0 has factors of 2 parts of a weight, and [] are said: say which, "
              "with peftlite convert '…' NEW --alpha NUMBER --parts q v", alpha="1"),
    peer_file(FUSED, "loralib", "0 can't be: its parts ['0:2', '2:3'] have 3 outputs, and B 4",
              alpha="1", parts='["0:2", "2:3"]'),
    # mlx-lm
    mlx_folder("has the fine_tune_type 'full', which leaves whole weights: pl.extract makes a "
               "delta of the model before and after", fine_tune_type="full"),
    mlx_folder("has both alpha and scale: mlx-lm made scale·alpha/rank of them once, and goes by "
               "scale alone since; write the right one as scale, and take alpha out",
               lora_parameters={"rank": 2, "scale": 20.0, "alpha": 16}),
    mlx_folder("has 'rank' as 4, and the tensors beside it have 2: they aren't of one adapter, so "
               "save it again", lora_parameters={"rank": 4, "scale": 20.0}),
    mlx_folder("has 'num_layers' as 1, and the tensors beside it have 2: they aren't of one "
               "adapter, so save it again"),
    mlx_folder("has 'fine_tune_type' as dora, and the tensors beside it have lora: they aren't of "
               "one adapter, so save it again", fine_tune_type="dora"),
    # convert
    converting("to must be one of 'safetensors', 'peftlite', 'peft', 'kohya', 'diffusers', "
               "'gguf', not 'pt'", None, to="pt"),
    converting("'peft' goes by a model: give it with model=, or convert to 'safetensors', which "
               "leaves names as they are", None, to="peft"),
    Case(lambda model, path: convert(path, path, "peft", model=model), "convert takes a model "
         "without deltas: pl.detach them first"),
    converting("'…' is neither a safetensors file nor a pickle of tensors alone, and nothing else "
               "is unpickled, since it may run code", lambda path: torch.save(Case, path)),
    converting("'…' holds 3 as 'b', no plain tensor", lambda path: torch.save(
        {"a": torch.ones(1), "b": 3}, path)),
    converting("'…' holds the class dict as 'a', no plain tensor", endless),
    converting("'…' holds the class Tensor as 'a', no plain tensor", lambda path: torch.save(
        {"a": torch.ones(1).expand(10**12)}, path)),
    converting("'…' is of …, and would unpack to 156.2 KiB", lambda path: torch.save(
        dict.fromkeys(map(str, range(10)), torch.ones(4000)), path)),
    converting("'…' is of …, and would unpack to …", squeezed),
    converting("alpha= and parts= are for files that don't say them, and '…' is of kohya",
               peers(pair()), alpha=3),
    converting("alpha= and parts= are for files that don't say them, and '…' is of no such format",
               lambda path: path.write_bytes(good()), parts=["q"]),
    # export
    into_kohya(pl.FourierFT(targets="0"), linears(), "there it has LoRA, DoRA, LoHa, LoKr, OFT, "
               "BOFT, IA3, and no FourierFT"),
    into_kohya(pl.OFT(block_size=2, targets="0"), linears(), "there a rotation is of outputs, "
               "exact, and without a bound"),
    into_kohya(pl.OFT(block_size=4, outputs=True, targets="0"), linears(), "there 1 blocks of 4 "
               "are of 1 factors if they are 2ⁿ, and blocks of one factor are no larger than their "
               "number"),
    into_kohya(pl.LoRA(rank=1, targets="0.weight[0:2]"), linears(), WHOLE),
    into_kohya(pl.LoRA(rank=1, targets="0"), nn.Sequential(nn.Embedding(4, 4)), WHOLE),
    into_kohya(pl.LoRA(rank=1, targets="0"), nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)),
               "a change there sees the inputs of all groups", "diffusers"),
    into_kohya(pl.LoRA(rank=1), twins(), "it is tied to 1.weight"),
    into_kohya(pl.LoRA(rank=1), linears(device="meta"), "it is on the meta device and has no "
               "values"),
    into_kohya(pl.LoRA(rank=1, targets="*"), namesakes(), "another module, too, is called "
               "lycoris_a_b there"),
    Case(lambda model, path: pl.export(delta(model), path, "kohya"), "0.weight can't go into a "
         "file of kohya, since it has values that aren't finite: …", model=no_number),
    Case(lambda model, path: pl.export(delta(model), path, "kohya", settings={"step": 3}),
         "settings are a file's metadata in the format of kohya, all of them text: not {'step': "
         "3}"),
]  # fmt: skip
