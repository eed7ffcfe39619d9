"""merge_files: the same bits as merging the model, whole or not at all, a tensor at a time."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.core.site import sites as sites_of
from peftlite.core.values import checked
from peftlite.io import checkpoint, merge_files
from peftlite.io.checkpoint import Checkpoint
from peftlite.io.standin import stand_in
from tests.cards.card import Row
from tests.cells import CELLS, attached, unmergeable
from tests.digest import bits
from tests.zoo import KINDS, Kind, seeded

LLAMA = next(kind for kind in KINDS if kind.name == "hf_llama")
# where a patch goes by what its module is, or a tensor has several names
TELLING = (
    "experts", "conv2d_grouped", "conv_transpose", "conv1d_hf", "bilinear", "mha_decoder", "gru",
    "embedding_bag", "shared", "gpt_tied", "hf_gpt2", "hf_t5", "norms",
)  # fmt: skip
CASES = [
    cell
    for cell in CELLS
    if cell.values[1].name in TELLING
    and (cell.values[0].name.endswith(("_anywhere", "_rows")) or cell.values[0].name in (
        "ia3", "ia3_feedforward", "oft", "bitfit", "norm", "shira", "vblora", "full", "lora_pissa",
    ))
]  # fmt: skip


def saved(row: Row, kind: Kind, folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Path, Path]:
    """A model with a delta, the file of its base and the file of its delta."""
    model, delta = attached(row, kind, dtype=dtype)
    base, path = folder / "base.safetensors", folder / "delta.safetensors"
    safetensors.torch.save_model(kind.model(dtype), base, {"format": "pt", "by": "me"})
    pl.save(delta, path)
    return model, base, path


@pytest.mark.parametrize("row, kind", CASES)
def test_gives_the_bits_of_merging_the_model(row: Row, kind: Kind, tmp_path: Path) -> None:
    model, base, delta = saved(row, kind, tmp_path, torch.bfloat16)
    if unmergeable(pl.deltas(model)["a"]):
        return
    receipt = pl.merge_files(base, delta, tmp_path / "out.safetensors")
    merged = pl.merge(model, "a", backup="none")
    safetensors.torch.save_model(model, tmp_path / "expected.safetensors")
    found, expected = (Checkpoint(tmp_path / f"{name}.safetensors") for name in ("out", "expected"))
    assert found.keys() == expected.keys()
    assert all(bits(found[key]) == bits(expected[key]) for key in found)
    assert sorted(receipt.max_change.values()) == sorted(merged.max_change.values())
    before, after = (tmp_path / f"{name}.safetensors" for name in ("base", "out"))
    start = int.from_bytes(before.read_bytes()[:8], "little") + 8
    assert before.read_bytes()[:start] == after.read_bytes()[:start]


LORA = Row("lora", pl.LoRA(rank=2))


@pytest.fixture
def sharded(tmp_path: Path) -> tuple[nn.Module, Path, Path]:
    """A small Llama with a delta, the folder of its base in shards, and its delta's file."""
    model, delta = attached(LORA, LLAMA)
    LLAMA.model().save_pretrained(tmp_path / "base", max_shard_size="6KB")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"another format")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    pl.save(delta, tmp_path / "delta.safetensors")
    return model, tmp_path / "base", tmp_path / "delta.safetensors"


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_shards_stay_shards(sharded: Any, tmp_path: Path) -> None:
    model, base, delta = sharded
    index = next(base.glob("*.index.json"))
    assert len({*json.loads(index.read_text())["weight_map"].values()}) > 3
    receipt = pl.merge_files(index, delta, tmp_path / "out")
    assert left(tmp_path / "out") == [n for n in left(base) if n != "pytorch_model.bin"]
    assert (tmp_path / "out" / index.name).read_bytes() == index.read_bytes()
    text = str(receipt)
    assert text.startswith("merged 'a', for good\n") and "rounding" not in text
    pl.merge(model, "a", backup="none")
    loaded = type(model).from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert bits(loaded.state_dict()[name]) == bits(tensor)


def test_one_tensor_is_in_memory_at_a_time(sharded: Any, tmp_path: Path) -> None:
    _, base, delta = sharded
    seen: list[weakref.ref[Tensor]] = []

    def watched(name: str, key: str, patches: Any, w: Tensor) -> tuple[Tensor, float]:
        assert not [ref for ref in seen if ref() is not None]
        value, change = checked(name, key, patches, w)
        seen.extend(map(weakref.ref, (w, value)))
        return value, change

    with mock.patch.object(merge_files, "checked", watched):
        pl.merge_files(base, delta, tmp_path / "out")
    assert len(seen) == 2 * 14


def test_another_base_is_refused_before_anything_is_there(sharded: Any, tmp_path: Path) -> None:
    _, base, delta = sharded
    q = "model.layers.1.self_attn.q_proj.weight"
    shard = base / json.loads(next(base.glob("*.index.json")).read_text())["weight_map"][q]
    tensors = safetensors.torch.load_file(shard)
    tensors[q].view(torch.int32)[0, 0] += 1  # one unit in the last place
    safetensors.torch.save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(pl.BaseMismatchError, match=f"other base weights: {q} differs; merge it"):
        pl.merge_files(base, delta, tmp_path / "out")
    assert left(tmp_path) == ["base", "delta.safetensors"]
    with pytest.warns(UserWarning, match=f"{q} differs"):
        pl.merge_files(base, delta, tmp_path / "warned", check_base="warn")
    pl.merge_files(base, delta, tmp_path / "off", check_base="off")
    for name in left(tmp_path / "off"):
        assert (tmp_path / "off" / name).read_bytes() == (tmp_path / "warned" / name).read_bytes()


@pytest.mark.parametrize("one", [False, True])
def test_a_fault_at_any_step_leaves_nothing(sharded: Any, tmp_path: Path, one: bool) -> None:
    _, base, delta = sharded
    out = tmp_path / ("out.safetensors" if one else "out")
    if one:
        shutil.rmtree(base)
        safetensors.torch.save_model(LLAMA.model(), base)
        out.write_bytes(b"older")
    before = left(tmp_path)
    step, failures = checkpoint.data_of, 0
    while True:
        countdown = iter(range(failures, -1, -1))

        def failing(tensor: Tensor, countdown: Any = countdown) -> Any:
            if next(countdown, None) == 0:
                raise OSError(28, "No space left on device")
            return step(tensor)

        try:
            with mock.patch.object(checkpoint, "data_of", failing):
                pl.merge_files(base, delta, out)
            break
        except pl.FileError as error:
            assert "No space left" in str(error)
            assert left(tmp_path) == before
            assert not one or out.read_bytes() == b"older"
            failures += 1
    assert failures == 14
    assert out.exists()


def test_a_peers_delta_is_merged_too(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = LLAMA.model()
    model.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    wrapped.save_pretrained(tmp_path / "delta")
    pl.merge_files(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    merged = wrapped.merge_and_unload().state_dict()
    found = Checkpoint(tmp_path / "out")
    assert found.keys() <= merged.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, merged[key])


@pytest.mark.parametrize("tied", [None, True, False])
@pytest.mark.parametrize("form", ["file", "folder"])
def test_what_is_tied_is_merged_as_one_or_refused(
    tied: bool | None, form: str, tmp_path: Path
) -> None:
    """config.json says it of transformers' models, metadata of others; both leave out a name."""
    from peft import LoraConfig, TrainableTokensConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2() -> Any:
        with seeded():
            config = GPT2Config(
                n_embd=16, n_layer=1, n_head=2, vocab_size=29, n_positions=8, bos_token_id=0,
                eos_token_id=0, tie_word_embeddings=tied is not False,
            )  # fmt: skip
            return GPT2LMHeadModel(config).eval()

    ids, base = torch.tensor([[1, 3, 5]]), tmp_path / "base"
    gpt2().save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    if tied:  # as transformers 5 writes it
        (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    for name, adapter in (
        ("tokens", TrainableTokensConfig(token_indices=[3, 5])),
        ("whole", LoraConfig(
            r=2, target_modules=["c_fc"], modules_to_save=["wte"], fan_in_fan_out=True,
        )),
    ):  # fmt: skip
        theirs = get_peft_model(gpt2(), adapter).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.ones_like(parameter))
            expected = theirs(ids).logits
        theirs.save_pretrained(tmp_path / name)
        file = base / "model.safetensors" if form == "file" else base
        out = tmp_path / f"{name}.safetensors" if form == "file" else tmp_path / f"{name}-merged"
        if name == "whole" and tied is not False:
            with pytest.raises(
                pl.FileError, match=r"apart from lm_head\.weight, and this model ties"
            ):
                pl.merge_files(file, tmp_path / name, out)
            continue
        pl.merge_files(file, tmp_path / name, out)
        model = gpt2()
        tensors = safetensors.torch.load_file(out if form == "file" else out / "model.safetensors")
        model.load_state_dict(tensors, strict=False)
        torch.testing.assert_close(model(ids).logits, expected)


def test_a_delta_of_an_untied_model_is_none_of_a_tied_one(tmp_path: Path) -> None:
    kind = next(kind for kind in KINDS if kind.name == "gpt_tied")
    model: Any = kind.model()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    pl.save(pl.attach(model, pl.FullTuning(targets="embed")), tmp_path / "delta.safetensors")
    safetensors.torch.save_model(kind.model(), tmp_path / "base.safetensors")
    for load in (
        lambda: pl.load(kind.model(), tmp_path / "delta.safetensors"),
        lambda: pl.merge_files(*(tmp_path / f"{n}.safetensors" for n in ("base", "delta", "out"))),
    ):
        with pytest.raises(pl.FileError, match=r"tied to lm_head\.weight, and was tied to nothing"):
            load()


def test_a_stand_in_guesses_what_no_file_tells() -> None:
    tensors = {"wte.weight": torch.zeros(5, 4), "h.0.c_attn.weight": torch.zeros(4, 12),
               "conv.weight": torch.zeros(3, 2, 5, 5), "norm.weight": torch.zeros(4),
               "experts": torch.zeros(3, 4, 4), "": torch.zeros(2)}  # fmt: skip
    sites = {s.address: s for s in sites_of(stand_in(tensors, {}, transposed=True))}
    linear = {address for address, site in sites.items() if not site.is_call and site.linear}
    assert linear == {"h.0.c_attn.weight", "conv.weight"}
    transposed = {a for a, site in sites.items() if not site.is_call and site.layout.transposed}
    assert transposed == {"wte.weight", "h.0.c_attn.weight"}


@torch.no_grad()
def test_a_checkpoint_has_the_names_that_its_class_of_transformers_saves(tmp_path: Path) -> None:
    """LLaVA's are those of older releases, and not those that its modules have by now."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    text = {**sizes, "model_type": "llama", "vocab_size": 16}
    sight = {"model_type": "clip_vision_model", "image_size": 4, "patch_size": 2}
    config = LlavaConfig(text_config=text, vision_config=sizes | sight, image_token_index=15)
    model: Any = LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "base")
    assert "language_model.lm_head.weight" in Checkpoint(tmp_path / "base")
    methods = [pl.LoRA(rank=2, targets=["q_proj", "fc1"]), pl.FullTuning(targets="norm")]
    delta = pl.attach(model, methods, name="a")
    for parameter in delta.parameters():
        parameter.normal_()
    ids = torch.tensor([[1, 2, 3]])
    expected = model(input_ids=ids).logits
    pl.save(delta, tmp_path / "a.safetensors")
    pl.export(delta, tmp_path / "peft")
    for path in ("a.safetensors", "peft"):
        pl.merge_files(tmp_path / "base", tmp_path / path, tmp_path / f"{path}.out")
        merged: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / f"{path}.out")
        assert (merged.eval()(input_ids=ids).logits - expected).abs().max() <= 1e-5
    other = Checkpoint(tmp_path / "peft.out")
    safetensors.torch.save_file(dict(other), tmp_path / "base" / "model.safetensors")
    with pytest.raises(pl.BaseMismatchError, match="other base weights: language_model"):
        pl.merge_files(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "other")
