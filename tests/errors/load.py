"""The errors of load and inspect."""

import functools
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.io import packing
from peftlite.io.files import Entry, Tensors, write_tensors
from tests.digest import bits
from tests.errors.attach import A_NAME, ALPHA, DTYPE, RANK
from tests.errors.case import SMALL, Case, bare, delta, on, two
from tests.errors.merge import Q
from tests.errors.save import A_PATH
from tests.errors.targets import BEYOND, NO_PART, TWO_OR_MORE
from tests.zoo import seeded


@functools.cache
def good() -> bytes:
    """A sound file."""
    with seeded(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sql"
        pl.save(pl.attach(bare(), SMALL, "sql"), path)
        return path.read_bytes()


def parts() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a sound file."""
    (length,) = struct.unpack("<Q", good()[:8])
    header = json.loads(json.loads(good()[8 : 8 + length])["__metadata__"]["peftlite"])
    return header, safetensors.torch.load(good())


def header(**changes: Any) -> Callable[[Path], None]:
    """A file with other entries in its header."""
    return edited(lambda old, _: old.update(changes))


def method(**changes: Any) -> Callable[[Path], None]:
    """A file with other entries for its method."""
    return edited(lambda old, _: old["methods"][0].update(changes))


def config(**changes: Any) -> Callable[[Path], None]:
    """A file with other settings of its method."""
    return edited(lambda old, _: old["methods"][0]["config"].update(changes))


def more_sites(*addresses: str) -> Callable[[Path], None]:
    return edited(lambda old, _: old["methods"][0]["sites"].extend(addresses))


def tensor(change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """A file with another tensor in the place of the first."""
    return edited(lambda _, old: old.update({f"{Q}:a": change(old[f"{Q}:a"])}))


def edited(edit: Callable[[dict, dict], Any]) -> Callable[[Path], None]:
    """A file as someone would write it who knows the format, digests and all."""

    def write(path: Path) -> None:
        head, values = parts()
        del head["sha256"]
        edit(head, values)
        if "tensors" in head:
            head["tensors"] = {key: told(value) for key, value in values.items()}
        head["sha256"] = hashlib.sha256(canonical(head).encode()).hexdigest()
        entries = {key: Entry(value.dtype, tuple(value.shape)) for key, value in values.items()}
        with path.open("wb") as file:
            text = {"peftlite": canonical(head)}
            write_tensors(file, entries, values.__getitem__, lambda _: text)

    return write


def sparse(path: Path) -> None:
    """A file with a tensor packed as sparse, one index too high."""

    def edit(head: dict[str, Any], values: dict[str, Tensor]) -> None:
        stored, head["packed"] = packing.pack({f"{Q}:a": torch.eye(2, 16)}, "sparse")
        values |= stored
        values[f"{Q}:a#at"][-1] = 32

    edited(edit)(path)


def unsound(method: pl.Method, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A file of a delta whose every patch was tampered with before it was saved."""

    def write(path: Path) -> None:
        tampered = pl.attach(bare(), method, "sql")
        for placed in tampered.placed.values():
            change(placed.patch)
        pl.save(tampered, path)

    return write


def no_such_vector(patch: Any) -> None:
    patch.resize({"indices_a": ()})
    patch.indices_a.fill_(200)


def canonical(head: dict[str, Any]) -> str:
    return json.dumps(head, sort_keys=True, ensure_ascii=False)


def told(tensor: Tensor) -> dict[str, Any]:
    dtype, digest = str(tensor.dtype).removeprefix("torch."), hashlib.sha256(bits(tensor))
    return {"dtype": dtype, "shape": [*tensor.shape], "sha256": digest.hexdigest()}


def raw(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


def metadata(entries: dict[str, str] | None) -> Callable[[Path], Any]:
    return raw(safetensors.torch.save({"layer.frob": torch.zeros(2)}, entries))


def loading(**options: Any) -> Callable[[Any, Path], Any]:
    return lambda model, path: pl.load(model, path, **options)


def bad_file(
    file: Callable[[Path], Any] | None,
    says: str,
    kind: type[Exception] = pl.FileError,
    model: Callable[[], Any] = bare,
    **options: Any,
) -> Case:
    return Case(loading(**options), says, kind, model, file)


def exotic(path: Path) -> None:
    """A file with a dtype of its own."""
    head = json.dumps({"x": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"\0\0")


def cut_while_read(_: Any, path: Path) -> None:
    file, data = Tensors(path), path.read_bytes()
    os.truncate(path, len(data) - 1)
    try:
        for key in file.entries:
            file.get(key)
    finally:
        path.write_bytes(data)


def nest(head: dict[str, Any], _: Any) -> None:
    own = head["methods"][0]
    for _ in range(12):
        settings = {
            "per": "token",
            "dtype": None,
            "method": {k: own[k] for k in ("method", "config")},
        }
        own = {"method": "Gated", "config": settings}
    head["methods"][0].update(own)


DAMAGED = "'…' is no safetensors file, or is damaged: …"
PICKLE = (
    "a pickle, which may run code as it is read: `peftlite convert FILE new.safetensors` makes a "
    "safetensors file of its tensors"
)
BROKEN = "'…' has a broken header: its "
FOREIGN = "'…' is no delta of a known format; it holds "

# what is wrong with a file whatever the model: pl.inspect says the same
UNREADABLE = [
    (None, "there is no file '…'"),
    (Path.mkdir, "'…' is a folder: name the file in it"),
    *((raw(data), DAMAGED) for data in (
        b"", b"\x80\x04K\x01.", b"text" * 9, good()[:7], good()[:200],
        good()[:-1], good() + b"\0", good()[:8] + b"}" + good()[9:],
        struct.pack("<Q", 2**63) + good()[8:], struct.pack("<Q", 0) + good()[8:],
    )),
    *((raw(start * 9), f"'…' is {what}") for start, what in (
        (b"PK\x03\x04", PICKLE), (b"\x80\x02\x8a\x0a", PICKLE),
        (b"GGUF", "a file of llama.cpp's: give what it was made from"),
        (b"<html>", "a page of the web, no safetensors file: download it again"),
        (b"version https://git-lfs.github.com/spec/v1", "git-lfs's pointer to a file that wasn't "
         "fetched: type git lfs pull in its folder"),
    )),
    (os.mkfifo, "'…' is a pipe, a socket or a device, no file"),
    (metadata(None), FOREIGN + "layer.frob"),
    (metadata({"format": "pt"}), FOREIGN + "format; layer.frob"),
    (raw(safetensors.torch.save({})), FOREIGN + "nothing"),
    *((metadata({"peftlite": data}), "'…' has a header that is no JSON: …")
      for data in ("", "{", "peftlite", "[" * 100_000)),
    *((metadata({"peftlite": data}), BROKEN + "'format' is None") for data in ("null", "[]", "3")),
    (header(format=2), "'…' has format 2, and this peftlite reads up to 1: upgrade peftlite"),
    *((header(format=value), f"{BROKEN}'format' is {value!r}")
      for value in (None, "1", True, 0.5, 0, -1)),
    (header(name=None), BROKEN + "'name' is None"),
    (header(library=3), BROKEN + "'library' is 3"),
    (header(base=[]), BROKEN + "'base' is []"),
    (edited(lambda old, _: old.pop("tensors")), BROKEN + "'tensors' is None"),
    (raw(good().replace(b"alpha", b"alphb")), "'…': here LoRA needs the setting 'alpha'"),
    (raw(good().replace(b"rank", b"ranc")), "'…': here LoRA has no setting 'ranc'"),
    *((raw(good().replace(old, new)), "'…' is damaged: its header isn't what was saved; copy it "
       "again") for old, new in ((b"float32", b"float23"), (b"sql", b"sqk"))),
    *((metadata({"peftlite": json.dumps({**parts()[0], **changes})}), "'…' is damaged: its header "
       "isn't what was saved; copy it again")
      for changes in ({"sha256": "0"}, {"library": "\ud800"}, {"more": float("nan")})),
    (header(base={"a": 3}), "'…' has a broken header: its base has 'a': 3"),
    (header(modules=[]), BROKEN + "'modules' is []"),
    *((header(modules={"a": its}), f"{BROKEN}'modules' has 'a': {its!r}")
      for its in (3, {}, {"module": "os.system"}, {"module": "Linear", "names": "b"},
                  {"groups": True, "module": "Conv2d"}, {"kernel": 3, "module": "Conv2d"})),
    (header(packed=[]), BROKEN + "'packed' is []"),
    (header(packed={"a": 3}), "'…' has a broken header: its 'packed' has 'a': 3"),
    (header(notes="by me"), BROKEN + "'notes' is 'by me'"),
    (exotic, "'…' has x as F8_E8M0, which torch lacks"),
    (edited(nest), "'…' has a broken header: methods within methods within methods …"),
    (header(methods={}), BROKEN + "'methods' is {}"),
    (header(methods=["LoRA"]), BROKEN + "'sites' is None"),
    *((method(sites=value), f"{BROKEN}'sites' is {value!r}") for value in (None, "a.weight", {})),
    *((method(sites=value), f"{BROKEN}'sites' are {value!r}") for value in ([], [3], [["a"]])),
    (method(method=["LoRA"]), BROKEN + "'method' is ['LoRA']"),
    (method(config=None), BROKEN + "'config' is None"),
    *((method(method=name), f"'…' holds the method '{name}', which isn't known here; known are "
       "…, LoRA… (a method of your own: import it first)")
      for name in ("Frobnicate", "Method", "os.system", "")),
    (method(method="BitFit"), "'…': here BitFit needs the setting 'add_missing'"),
    (method(config={}), "'…': here LoRA needs the setting 'alpha'"),
    (config(frob=1), "'…': here LoRA has no setting 'frob'"),
    (config(targets="*"), "'…': here LoRA has no setting 'targets'"),
    *((config(rank=value), f"'…' has an impossible setting of LoRA: {RANK}{value!r}")
      for value in (0, "2", True, 1.5, None)),
    (config(alpha=float("nan")), f"'…' has an impossible setting of LoRA: {ALPHA}nan"),
    *((config(dtype=value), f"'…' has an impossible setting of LoRA: {DTYPE}…")
      for value in ("frob", "nn", "load", "int8", 3)),
]  # fmt: skip


def otherwise(change: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    """A model whose weights are others than the file's."""

    def build() -> nn.Module:
        model = bare()
        with torch.no_grad():
            change(model)
        return model

    return build


def q_proj(linear: nn.Module) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model.blocks[0].attn, "q_proj", linear)


def integers(model: nn.Module) -> None:
    codes = torch.ones(12, 16, dtype=torch.int8)
    model.blocks[0].attn.q_proj.weight = nn.Parameter(codes, requires_grad=False)


MISFIT = "'…' doesn't fit this model: "
OTHER = "'…' was made for other base weights: "
LOAD_IT = "; load it into the base it was trained on, or pass check_base='warn'"
SITES = "'…' is for a model with other sites: of "
LACKS_ALL = (
    "4, this one lacks 4: blocks.0.attn.q_proj.weight; blocks.1.attn.q_proj.weight; "
    "blocks.0.attn.v_proj.weight; blocks.1.attn.v_proj.weight; "
)

CASES = [
    *(bad_file(file, says) for file, says in UNREADABLE),
    *(Case(lambda _, path: pl.inspect(path), says, pl.FileError, nn.ReLU, file)
      for file, says in UNREADABLE),
    # the arguments
    Case(lambda model, path: pl.load(path, model), "load takes the model first, then the path"),
    Case(lambda model, _: pl.load(model, model.state_dict()), A_PATH + "an OrderedDict"),
    Case(lambda model, _: pl.inspect(delta(model)), A_PATH + "Delta('sql', LoRA, 224 parameters)"),
    bad_file(raw(good()), "check_base must be 'error', 'warn' or 'off', not False",
             pl.PeftliteError, check_base=False),
    bad_file(raw(good()), "a delta named 'sql' is attached already: choose another name=, or "
             "pl.detach(model, 'sql') first", pl.PeftliteError, two),
    bad_file(raw(good()), f"'a.b'{A_NAME}", pl.PeftliteError, name="a.b"),
    bad_file(header(name="../sql"), f"'../sql'{A_NAME}", pl.PeftliteError),
    Case(torch.inference_mode()(loading()), "under torch.inference_mode no gradient can ever flow: "
         "attach outside of it (torch.no_grad is fine)", pl.PeftliteError, bare, raw(good())),
    # another model
    bad_file(raw(good()), SITES + LACKS_ALL + "there are such as '0.weight', '0.bias', '2.weight'",
             model=on("mlp")),
    bad_file(raw(good()), SITES + LACKS_ALL + "nearest: 'blocks.0.attn.o_proj.weight', "
             "'blocks.1.attn.o_proj.weight', 'blocks.0.attn.qkv.weight', "
             "'blocks.0.attn_norm.weight'", model=on("gpt_fused")),
    bad_file(more_sites("lm_head"), SITES + "5, this one lacks 1: lm_head; nearest: 'lm_head', "
             "'lm_head()', 'lm_head.weight'"),
    bad_file(more_sites("*.k_proj"), SITES + "5, this one lacks 1: *.k_proj; nearest: …"),
    bad_file(more_sites("blocks.0.attn()[0:4]"),
             SITES + "5, this one lacks 1: blocks.0.attn()[0:4]; …"),
    bad_file(more_sites(Q), f"'…' names the site {Q} twice"),
    bad_file(more_sites(Q + "[0:4]"),
             f"{MISFIT}{Q}[0:4] and {Q} share entries of one tensor in this model"),
    bad_file(more_sites("embed.weight", "lm_head.weight"), f"{MISFIT}lm_head.weight and "
             "embed.weight share entries of one tensor in this model", model=on("gpt_tied")),
    bad_file(raw(good()), f"{MISFIT}{Q} is on the meta device: give the model its weights, then "
             "load", model=lambda: bare().to("meta")),
    bad_file(edited(lambda old, _: old["modules"].update({Q: {"module": "Conv1D"}})),
             f"{MISFIT}{Q} is stored as (outputs, inputs), and was as (inputs, outputs), in a "
             "Conv1D, where the delta was made"),
    bad_file(edited(lambda old, _: old["modules"][Q].update(names=["lm_head.weight"])),
             f"{MISFIT}{Q} is tied to nothing, and was tied to lm_head.weight where the delta was "
             "made"),
    bad_file(more_sites("lm_head.weight[0:99]"), MISFIT + "[0:99]" + BEYOND + "[0:29]"),
    bad_file(more_sites("lm_head.weight[zz]"), MISFIT + "[zz]" + NO_PART),
    bad_file(more_sites("norm.weight"), f"{MISFIT}norm.weight is a tensor of shape (16,); "
             + TWO_OR_MORE),
    bad_file(more_sites("blocks.0.attn()"), f"{MISFIT}blocks.0.attn() is a call; {TWO_OR_MORE}"),
    bad_file(raw(good()), f"{MISFIT}{Q} holds torch.int8: no gradient can flow through it",
             model=otherwise(integers)),
    bad_file(raw(good()), f"{MISFIT}it has {Q}:a as (2, 16), not (2, 32)",
             model=otherwise(q_proj(nn.Linear(32, 12, bias=False)))),
    # other tensors than it says
    Case(cut_while_read, "'…' was cut short while it was read: get it again", pl.FileError, bare,
         raw(good())),
    bad_file(sparse, f"'…' has {Q}:a in no sound packing: an index is out of its tensor"),
    bad_file(raw(good()[:-1] + bytes([good()[-1] ^ 1])),
             "'…' is damaged, copy it again: not what was saved is blocks.1.attn.v_proj.weight:b"),
    bad_file(edited(lambda _, old: old.pop(f"{Q}:a")), f"{MISFIT}it has no {Q}:a"),
    *(bad_file(unsound(pl.SparseMask(targets="q_proj"), change),
               f"{MISFIT}{Q} has indices beyond the tensor, or out of order")
      for change in (lambda patch: patch.indices.neg_(), lambda patch: patch.indices.add_(191))),
    bad_file(unsound(pl.VBLoRA(rank=2, num_vectors=9, vector_length=4, save_only_topk_weights=True),
                     no_such_vector), MISFIT + "… has indices of no vector in the bank"),
    bad_file(edited(lambda _, old: old.update(x=torch.zeros(2))),
             f"{MISFIT}it has x, which nothing asks for"),
    bad_file(header(methods=[]), f"{MISFIT}it has {Q}:a, which nothing asks for; …; and 4 more"),
    bad_file(tensor(lambda a: a[0]), f"{MISFIT}it has {Q}:a as (16,), not (2, 16)"),
    *(bad_file(tensor(lambda a, by=by: a * by), f"{MISFIT}it has {Q}:a with values that aren't "
               "finite") for by in (torch.nan, torch.inf)),
    *(bad_file(tensor(lambda a, dtype=dtype: a.to(dtype)),
               f"{MISFIT}it has {Q}:a as {dtype}, not torch.float32")
      for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)),
    bad_file(config(rank=3), f"{MISFIT}it has {Q}:a as (2, 16), not (3, 16); …; and 4 more"),
    bad_file(config(rank=10**9), f"{MISFIT}it has {Q}:a as (2, 16), not (1000000000, 16); …"),
    bad_file(config(rank=10**18), f"{MISFIT}…overflow…"),
    bad_file(config(init="pissa"), f"{MISFIT}it has no {Q}:a0; …; and 4 more"),
    bad_file(config(init="pissa", rank=100), f"{MISFIT}blocks.0.attn.q_proj.weight has matrices of "
             "12×16, whose rank is at most 12: init='pissa' has no 100 directions to take"),
    # another base
    bad_file(raw(good()), f"{OTHER}1 of 4 tensors differ: {Q}{LOAD_IT}", pl.BaseMismatchError,
             otherwise(lambda model: model.blocks[0].attn.q_proj.weight[0, 0].add_(1e-3))),
    bad_file(raw(good()), f"{OTHER}4 of 4 tensors differ: {Q} (dtype float32, here bfloat16); …"
             f"{LOAD_IT}", pl.BaseMismatchError, otherwise(nn.Module.bfloat16)),
    bad_file(edited(lambda old, _: old["base"].pop(Q)), f"'…' lacks the fingerprint of {Q}"),
]  # fmt: skip
