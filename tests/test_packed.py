"""Packed bases: bytes as bitsandbytes writes them, and a model that is what its codes stand for."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftlite as pl
from peftlite.core.tensors import raw
from peftlite.quant import keys, nf4
from peftlite.quant.packing import KINDS as FORMATS
from peftlite.quant.packing import Packing, pack, pack_beside
from tests.cells import disturb
from tests.digest import assert_same, bits, digest
from tests.zoo import KINDS, Kind, seeded

GOLDEN = Path(__file__).parent / "bitsandbytes_0.50.2.safetensors"
KIND = {kind.name: kind for kind in KINDS}
EVERY = [kind for kind in KINDS if not kind.packed]
each_format = pytest.mark.parametrize("format", FORMATS)


def mlp(o: int = 6) -> nn.Module:
    with seeded():
        return nn.Sequential(nn.Linear(64, 72), nn.GELU(), nn.Linear(72, o)).eval()


def entries(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {k.removeprefix(start).lstrip("."): v for k, v in tensors.items() if k.startswith(start)}


# -- formats


@pytest.mark.parametrize("name", ["double", "single", "odd", "zeros"])
def test_nf4_is_bitsandbytes_byte_for_byte(name: str) -> None:
    theirs = safetensors.torch.load_file(GOLDEN)
    w, written = theirs[f"{name}.w"], entries(theirs, f"{name}.weight")
    how, parts = pack(w, "nf4", 128 if name == "single" else 64, double=name != "single")
    mine = keys.written(how, parts)
    state = "quant_state.bitsandbytes__nf4"
    assert mine.keys() == written.keys()
    assert all(torch.equal(mine[key], written[key]) for key in mine if key != state)
    again, found = keys.read(written)
    assert again == how
    assert all(torch.equal(part, parts[key]) for key, part in found.items())
    assert torch.equal(again.unpack(found), theirs[f"{name}.formed"])


def test_errors_are_those_of_normal_weights() -> None:
    """The relative error of 4,000,000 weights, as published or as the steps of a format give it."""
    with seeded():
        w = torch.randn(2000, 2000)
    wanted = {("nf4", False): 0.0920, ("nf4", True): 0.0856, ("int8", False): 0.0081}
    for (kind, search), error in (wanted | {("fp8", False): 0.0265}).items():
        how, parts = pack(w, kind, search=search)
        formed = how.unpack(parts)
        assert float((formed - w).norm() / w.norm()) == pytest.approx(error, abs=3e-4)
        if kind == "nf4" and not search:
            assert float((formed - w).abs().mean()) == pytest.approx(0.0728, abs=3e-4)


def test_codes_are_the_nearest_to_the_last_bit() -> None:
    """Beside each bound of two codes, and each number that a bin of the table begins at."""
    c = nf4.levels()
    bounds = (c[1:] + c[:-1]) / 2
    beside = [bounds]
    for way in (-torch.inf, torch.inf):
        step = bounds
        for _ in range(3):
            step = torch.nextafter(step, torch.tensor(way))
            beside.append(step)
    with seeded():
        y = torch.cat([*beside, torch.randn(64), torch.arange(-(2**15), 2**15) / 2**15])
    y = torch.cat([y, torch.ones(-len(y) % 64)]).view(-1, 64)
    codes = nf4.nearest(y, torch.ones(len(y)))
    assert torch.equal(codes, torch.bucketize(y, bounds).to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("n", "block"), [(3, 64), (70, 32), (2**18 + 4096 + 7, 4096)])
def test_what_is_read_is_the_formula(n: int, block: int, dtype: torch.dtype) -> None:
    with seeded():
        how, parts = pack(torch.randn(n).to(dtype), "nf4", block)
    byte = parts[""].view(-1)
    q = torch.stack([byte >> 4, byte & 15], 1).view(-1)[:n]
    scale = nf4.scales(parts).repeat_interleave(block)[:n]
    assert torch.equal(how.unpack(parts), (nf4.levels()[q.int()] * scale).to(dtype))


def test_what_is_kept_in_inference_mode_serves_training() -> None:
    def both() -> None:
        model, x = mlp(), torch.randn(3, 64, requires_grad=True)
        with torch.inference_mode():
            pl.quantize(model)
            model(x)
        model(x).sum().backward()

    with ThreadPoolExecutor(1) as pool:  # which has kept nothing yet
        pool.submit(both).result()


def test_a_product_beside_the_codes_makes_up_for_what_they_lose() -> None:
    """LoftQ's and QPiSSA's: by turns each is the best for what the other leaves."""
    with seeded():
        w = torch.randn(96, 80)
    lost = w - _formed(pack(w, "nf4"))
    once = w - _formed(pack_beside(w, 8, "loftq", 1, kind="nf4"))
    rest = torch.linalg.svdvals(lost)[8:].norm()
    torch.testing.assert_close(once.norm(), rest)
    more = {
        init: [(w - _formed(pack_beside(w, 8, init, t, kind="nf4"))).norm() for t in (1, 4)]
        for init in ("loftq", "pissa")
    }
    assert more["loftq"][1] < more["loftq"][0] < lost.norm()
    assert more["pissa"][0] < more["loftq"][0]


def _formed(packed: tuple[Packing, dict[str, Tensor]]) -> Tensor:
    return packed[0].unpack(packed[1])


def test_fp8_is_read_as_torch_casts_it() -> None:
    codes = torch.arange(256).to(torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(-1, 1)  # all but NaN
    how, parts = pack(torch.ones(254, 1), "fp8")
    formed = how.unpack({"": codes, "scale": torch.ones_like(parts["scale"])})
    assert torch.equal(formed, codes.view(torch.float8_e4m3fn).float())


def test_no_part_is_a_view_and_all_are_finite() -> None:
    """safetensors refuses views in `load_model`, as accelerate calls it."""
    for w in (torch.randn(64, 64), torch.full((64, 64), 3e38)):
        packing, parts = pack(w, "nf4")
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in parts.values())
        assert packing.unpack(parts).isfinite().all()


def test_bytes_of_a_weight() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 2))
    before, after = pl.quantize(model).nbytes
    assert (before, after) == (4 * 2**20, pytest.approx(0.516 * 2**20, rel=1e-3))


# -- models


def packed_bytes(model: nn.Module) -> dict[str, bytes]:
    """Of codes and all that is beside them, as a state dict has them."""
    state = {key: tensor for key, tensor in model.state_dict().items()}
    starts = [key.rpartition(".quant_state")[0] for key in state if ".quant_state" in key]
    return {
        key: bits(tensor)
        for key, tensor in state.items()
        if any(key == start or key.startswith(f"{start}.") for start in starts)
    }


@pytest.mark.parametrize("kind", EVERY, ids=str)
def test_a_model_is_what_its_codes_stand_for(kind: Kind) -> None:
    """Outputs, and gradients before and after an eval; and no byte of it ever moves."""
    model, batch = kind.model(), kind.batch()
    pl.quantize(model, "nf4", targets="*")
    before = packed_bytes(model)
    plain = copy.deepcopy(model)
    pl.dequantize(plain)
    assert before and not packed_bytes(plain)
    assert torch.equal(kind.run(model, batch), kind.run(plain, batch))
    grads = []
    for each in (model, plain):
        with seeded():
            delta = disturb(pl.attach(each, pl.LoRA(rank=2), "a"))
        for mode in (True, False):
            with torch.no_grad():
                kind.run(each.eval(), batch)
            kind.run(each.train(mode), batch).square().sum().backward()
        grads.append([p.grad for p in delta.parameters()])
        pl.detach(each, "a")
    for a, b in zip(*grads, strict=True):  # where paths meet, autograd adds in either order
        torch.testing.assert_close(a, b)
    model.to(torch.bfloat16).to(torch.float32)
    assert packed_bytes(model) == before


@pytest.mark.parametrize("format, rank", [("nf4", 0), ("int8", 0), ("fp8", 0), ("nf4", 2)])
def test_a_state_dict_gives_the_same_model(format: str, rank: int, tmp_path: Path) -> None:
    model, other = mlp(), mlp()
    with torch.no_grad():
        other[0].weight.mul_(2)
    pl.quantize(model, format, rank=rank)
    pl.quantize(other, format, rank=rank)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "packed.safetensors")
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "packed.safetensors"))
    assert packed_bytes(other) == packed_bytes(model)
    if rank:  # of which no plain one has a product
        with pytest.raises(RuntimeError, match=r"of .*, where here is .*'left', .*'right'"):
            other.load_state_dict(mlp().state_dict())
        return
    other.load_state_dict(mlp().state_dict())  # a plain one is packed as it comes
    assert packed_bytes(other) == packed_bytes(model)


def test_a_state_dict_that_does_not_fit_changes_no_code() -> None:
    model = mlp()
    pl.quantize(model, "nf4")
    before = packed_bytes(model)
    others = {"int8": "is Packing", "fp8": "is Packing", "nf4": "parts of"}
    for format, says in others.items():
        other = mlp()
        pl.quantize(other, format)
        state = other.state_dict()
        if format == "nf4":
            state["0.weight.absmax"] = state["0.weight.absmax"][1:]
        with pytest.raises(RuntimeError, match=f"0.weight .*{says}"):
            model.load_state_dict(state)
        assert packed_bytes(model)["0.weight"] == before["0.weight"]
    lacking = {k: v for k, v in model.state_dict().items() if not k.startswith("0.weight")}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0.weight\""):
        model.load_state_dict(lacking)
    lacking = {k: v for k, v in model.state_dict().items() if "quant_state" not in k}
    with pytest.raises(RuntimeError, match="is of no packing that is known here"):
        model.load_state_dict(lacking)


@each_format
def test_copies_pickles_and_views(format: str) -> None:
    model, x = mlp(), torch.randn(3, 64)
    pl.quantize(model, format)
    pl.attach(model, pl.LoRA(rank=2), "a")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False), pl.view(model, "a")):
        assert torch.equal(twin(x), model(x))
        assert type(twin[0]).__name__ == "Linear" and isinstance(twin[0], nn.Linear)


def test_tied_tensors_are_packed_once_and_stay_tied() -> None:
    kind = KIND["gpt_tied"]
    model = kind.model()
    packs = pl.quantize(model, targets="*")
    names = [*packs.shapes]
    tied = [name for name, p in model.named_parameters(remove_duplicate=False) if p.dim() == 2]
    assert len(names) == len(set(names))
    state = model.state_dict()
    head, embed = (next(n for n in tied if part in n) for part in ("head", "embed"))
    assert state[head].data_ptr() == state[embed].data_ptr()
    pl.dequantize(model)
    assert (
        dict(model.named_parameters(remove_duplicate=False))[head]
        is dict(model.named_parameters(remove_duplicate=False))[embed]
    )


@pytest.mark.parametrize("o", [1, 5, 33])
def test_any_size_trains_and_runs(o: int) -> None:
    """Where a kernel of bitsandbytes' for a CPU wants multiples of 32."""
    model, x = mlp(o), torch.randn(3, 64, requires_grad=True)
    pl.quantize(model, targets="*")
    with torch.no_grad():
        model(x)
    model(x).sum().backward()
    assert x.grad is not None


def test_nothing_of_the_weight_is_kept_for_the_backward_pass() -> None:
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    model = nn.Sequential(nn.Conv1d(4, 64, 3), nn.Flatten(), nn.Linear(64 * 6, 40))
    pl.quantize(model, targets="*")
    x = torch.randn(2, 4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)
    assert kept and not {(64, 4, 3), (40, 384), (384, 40)} & {*kept}
    y.sum().backward()
    plain = copy.deepcopy(model)
    pl.dequantize(plain)
    expected = torch.autograd.grad(plain(x).sum(), x)[0]
    assert torch.equal(x.grad, expected)


def test_gradients_of_gradients() -> None:
    model, x = mlp().double(), torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    pl.quantize(model, targets="*")
    assert torch.autograd.gradgradcheck(model, x)


def test_what_is_read_is_a_value() -> None:
    model = mlp()
    pl.quantize(model)
    w = model[0].weight
    assert (w.shape, w.dtype, w.device.type) == ((72, 64), torch.float32, "cpu")
    assert torch.equal(w + 0, raw(model[0], "weight").form())
    with pytest.raises(pl.PeftliteError, match=r"mul_ writes, .* kept in nf4.*pl.dequantize first"):
        model[0].weight.mul_(2)
    with pytest.raises(pl.PeftliteError, match="is packed, and no tensor can be put in its place"):
        model[0].weight = nn.Parameter(torch.zeros(72, 64))


@each_format
def test_a_merge_packs_again_and_goes_back_to_every_byte(format: str) -> None:
    model, x = mlp(), torch.randn(3, 64)
    pl.quantize(model, format)
    with seeded():
        disturb(pl.attach(model, pl.LoRA(rank=2), "a"))
    before, output = packed_bytes(model), model(x)
    with pytest.raises(pl.PeftliteError, match=r"0\.weight is packed, and merging packs it again"):
        pl.merge(model, "a", requantize=False)
    receipt = pl.merge(model, "a", backup="host")
    change = receipt.rounding["0.weight"]
    step = {"nf4": 0.2, "int8": 0.01, "fp8": 0.1}[format] * float(model[0].weight.abs().max())
    assert 0 < change <= step and packed_bytes(model) != before
    assert receipt.bytes_kept["0.weight"] < 1.1 * 72 * 64
    pl.unmerge(model, "a")
    assert packed_bytes(model) == before and torch.equal(model(x), output)


@pytest.mark.parametrize("how", [{"scales": "search"}, {"rank": 2}], ids=str)
def test_a_merge_packs_again_as_it_was_packed(how: dict) -> None:
    """A delta of nothing loses no more than the first packing, and keeps what is beside codes."""
    model, plain = mlp(), mlp()
    pl.quantize(model, **how)
    before = packed_bytes(model)
    delta = pl.attach(model, pl.FullTuning(targets="0.weight"), "a")
    with torch.no_grad():  # back to the weights that were packed
        delta.placed["0.weight"].patch.difference.copy_(plain[0].weight - model[0].weight)
    pl.merge(model, "a")
    lost = (model[0].weight - plain[0].weight).norm() / plain[0].weight.norm()
    assert lost <= 1.001 * pl.quantize(mlp(), **how).errors["0.weight"]
    pl.unmerge(model, "a")
    assert packed_bytes(model) == before


def test_embeddings_are_looked_up_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    formed: list[int] = []
    unpack = Packing.unpack
    monkeypatch.setattr(
        Packing, "unpack", lambda how, *a: formed.append(how.shape.numel()) or unpack(how, *a)
    )
    ids = torch.tensor([[3, 49, 3], [0, 7, 7]], dtype=torch.int32)
    for kind, options in (("nf4", {}), ("nf4", {"double_quant": False}), ("int8", {}), ("fp8", {})):
        with seeded():
            model = nn.Embedding(50, 64, padding_idx=7)
        pl.quantize(model, kind, targets="*", **options)
        expected = F.embedding(ids, model.weight + 0)
        formed.clear()
        assert torch.equal(model(ids), expected) and formed == [6 * 64]
        pl.attach(model, pl.LoRA(rank=2, targets="weight"))
        formed.clear()
        assert torch.equal(model(ids), expected) and formed == [6 * 64]
        with pytest.raises(IndexError):
            model(torch.tensor([50]))


@pytest.mark.parametrize("init", ["eva", "corda", "loftq", "pissa", "olora"])
@pytest.mark.parametrize("rank", [0, 4])
def test_starts_of_lora_on_a_packed_base(init: str, rank: int) -> None:
    model, plain = mlp(), mlp()
    pl.quantize(model, targets="0", rank=rank)
    with seeded():
        x = torch.randn(80, 64)
    before, output = packed_bytes(model), model(x)
    delta = pl.attach(model, pl.LoRA(rank=6, init=init, targets="0"))
    if init in ("eva", "corda", "loftq"):
        loss = lambda model, x: model(x).sum()  # noqa: E731
        pl.initialize(model, delta, [x], loss=loss, original=plain.state_dict())
    if init == "loftq":
        assert (model(x) - plain(x)).norm() < 0.95 * (output - plain(x)).norm()
    else:
        torch.testing.assert_close(model(x), output)
    pl.detach(model, "default")
    assert torch.equal(model(x), output) and packed_bytes(model) == before


def test_a_plan_counts_what_codes_stand_for_and_what_they_take() -> None:
    model, method = mlp(), pl.LoRA(rank=2)
    before = pl.plan(model, method)
    pl.quantize(model)
    after = pl.plan(model, method)
    assert after.base_parameters == before.base_parameters
    assert (before.packed_bytes, after.packed_bytes) == (after.base_bytes, after.base_bytes)
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert after.base_bytes == sum(tensors.values())
    assert after.optimizer_bytes == 2 * 4 * after.num_parameters
    assert "after pl.quantize)" in str(before) and "pl.quantize" not in str(after)
    assert pl.plan(model, method) and pl.plan(nn.Linear(64, 65, device="meta"), pl.BitFit())


@each_format
def test_a_delta_knows_the_codes_that_it_was_trained_on(format: str, tmp_path: Path) -> None:
    model = mlp()
    with seeded():
        x = torch.randn(8, 64)
    pl.quantize(model, format)
    data = [(x[i], x[i, :6]) for i in range(8)]
    delta = pl.attach(model, pl.LoRA(rank=2), "a")
    before = nn.functional.mse_loss(model(x), x[:, :6]).item()
    loss = pl.losses.regression
    pl.Trainer(model, loss, data, folder=tmp_path / "run", epochs=8, lr=1e-2).fit()
    assert nn.functional.mse_loss(model(x), x[:, :6]).item() < before
    pl.save(delta, tmp_path / "a.safetensors")
    output = model(x)
    fresh = mlp()
    with pytest.raises(pl.BaseMismatchError):
        pl.load(fresh, tmp_path / "a.safetensors")
    pl.quantize(fresh, format)
    pl.load(fresh, tmp_path / "a.safetensors", name="a")
    assert torch.equal(fresh(x), output.detach())


def test_in_a_graph_it_is_one_operation() -> None:
    model, x = mlp(), torch.randn(3, 64)
    pl.quantize(model)
    pl.attach(model, pl.LoRA(rank=2), "a")
    program = torch.export.export(model, (x,))
    assert program.graph_module.code.count("peftlite.unpack") == 1
    assert torch.equal(program.module()(x), model(x))


def test_a_refusal_changes_nothing() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    before = digest(model)
    with pytest.raises(pl.PeftliteError, match=r"2\.weight has numbers that aren't finite"):
        pl.quantize(model, targets="*")
    assert_same(before, digest(model))
