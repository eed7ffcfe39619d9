"""The errors of save."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.io import native
from tests.errors.case import Case, attached, delta, linears, saving, two
from tests.errors.merge import REPLACED, RESIZED, Q, poisoned, replaced, resized


def saved(given: Callable[[nn.Module, Path], Any], why: str) -> Case:
    return Case(lambda model, path: pl.save(delta(model), given(model, path)), why, pl.FileError)


def loading_state(tensors: Callable[[dict[str, Tensor]], Any]) -> Callable[[Any, Path], None]:
    return lambda model, _: delta(model).load_state_dict(tensors(delta(model).state_dict()))


@torch.no_grad()
def written_meanwhile(model: nn.Module, path: Path) -> None:
    parameter = next(delta(model).parameters())
    with mock.patch.object(native, "write_tensors", lambda *_: parameter.add_(0)):
        saving(model, path)


A_DELTA = "save takes a delta, such as pl.deltas(model)['sql'], or its name with model=model: not "
UNFIT = "these tensors don't fit 'sql': there is "
A_PATH = "a path is a str or an os.PathLike: not "

CASES = [
    Case(lambda _, path: pl.save("sql", path), A_DELTA + "'sql'"),
    Case(lambda model, path: pl.save(model, path), A_DELTA + "a GPT"),
    Case(lambda model, path: pl.save(path, delta(model)), A_DELTA + "a PosixPath"),
    Case(lambda model, path: pl.save("dba", path, model=model),
         "no delta is named 'dba' in this model; there are: 'sql', 'chat'"),
    Case(lambda model, path: pl.save(delta(two()), path, model=model),
         "'sql' is no delta of this model, or no longer"),
    Case(lambda model, _: pl.save(delta(model), None), A_PATH + "None"),
    Case(lambda model, _: pl.save(delta(model), b"sql"), A_PATH + "b'sql'"),
    saved(lambda _, path: path.parent, "can't write '…': it is a folder"),
    saved(lambda _, path: path / "deeper" / "sql", "can't write '…/deeper/sql': there is no folder "
          "'…/deeper'"),
    saved(lambda _, path: path.with_name("x" * 300), f"'…{'x' * 300}' can't be a path: File name "
          "too long"),
    saved(lambda _, path: f"{path}\0", r"can't write '…\x00': …embedded null …"),
    Case(saving, "can't write '…/sql.safetensors': it is no regular file", pl.FileError,
         file=os.mkfifo),
    Case(lambda model, path: pl.save(delta(model), path / "sql"),
         "can't write '…/sql.safetensors/sql': there is no folder '…'", pl.FileError,
         file=lambda path: path.write_bytes(b"")),
    Case(saving, "blocks.0.attn.q_proj.weight:a has values that aren't finite, so it could not be "
         "loaded", model=poisoned, file=lambda path: path.write_bytes(b"older")),
    Case(saving, "0.weight:a is on the meta device and has no values to save",
         model=attached(linears(device="meta"), pl.LoRA(rank=2))),
    Case(saving, RESIZED, model=resized),
    Case(saving, REPLACED, model=replaced),
    Case(lambda model, path: pl.export(delta(model), path), REPLACED, model=replaced),
    Case(written_meanwhile, "'sql' was written to while it was being saved, by another thread that "
         "no torch.optim.Optimizer steps in: save it between two of its steps"),
    *(Case(lambda model, path, its=its: pl.save(delta(model), path, **its), says)
      for its, says in (
          ({"pack": "int4"}, "pack must be one of None, 'bf16', 'int8', 'sparse', not 'int4'"),
          ({"base": "fast"}, "base must be one of 'sha256', 'sampled', not 'fast'"),
          ({"notes": {"at": Path()}}, "notes must be a dict that JSON can hold, not …"),
          ({"notes": "by me"}, "notes must be a dict that JSON can hold, not 'by me'"),
          ({"notes": {1: 2}}, "notes must be a dict that JSON can hold, not {1: 2}"),
      )),
    Case(loading_state(lambda own: None), "load_state_dict takes a dict of tensors, not None"),
    Case(loading_state(lambda own: {}), f"{UNFIT}no {Q}:a; no {Q}:b; no …:a; no …:b; and 4 more"),
    Case(loading_state(lambda own: {**own, "x": own[f"{Q}:a"]}),
         UNFIT + "x, which nothing asks for"),
    Case(loading_state(lambda own: {**own, f"{Q}:a": torch.zeros(8, 16)}),
         f"{UNFIT}{Q}:a as (8, 16), not (2, 16)"),
    Case(loading_state(lambda own: {**own, f"{Q}:a": 3}), f"{UNFIT}{Q}:a as 3, no tensor"),
    Case(loading_state(lambda own: {**own, f"{Q}:a": own[f"{Q}:a"].int()}),
         f"{UNFIT}{Q}:a as torch.int32, not torch.float32"),
    Case(loading_state(lambda own: {**own, f"{Q}:a": own[f"{Q}:a"].to("meta")}),
         f"{UNFIT}{Q}:a on the meta device, without values"),
]  # fmt: skip
