"""LTSFT: its two phases; and what holds for every search: files, checkpoints, compiled graphs."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import peftlite as pl
from peftlite.core.site import sites
from peftlite.methods.diff_pruning import DiffPruning
from peftlite.methods.ltsft import LTSFT
from peftlite.methods.search import SearchMethod
from tests.cells import Graphs, close
from tests.digest import assert_same, digest
from tests.zoo import KINDS, Kind, seeded

KIND = {kind.name: kind for kind in KINDS}
SEARCHES = pytest.mark.parametrize(
    "method",
    [LTSFT(steps=2, fraction=0.2), DiffPruning(steps=2, fraction=0.2, structured=True)],
    ids=lambda method: type(method).__name__,
)


def train(kind: Kind, model: nn.Module, delta: pl.Delta, optimizer, steps: range) -> None:
    model.train()
    for step in steps:
        with seeded(step):  # batches and gates alike
            output = kind.run(model, kind.batch(3))
            (output.square().mean() + delta.regularizer()).backward()
        optimizer.step()
        delta.step()
        optimizer.zero_grad()
    model.eval()


def adam(delta: pl.Delta) -> torch.optim.Optimizer:
    return torch.optim.AdamW(delta.parameters(), lr=1e-2)


def found(kind: Kind, method: SearchMethod, steps: int = 4) -> tuple[nn.Module, pl.Delta]:
    """A model after some steps of training, in eval mode."""
    model = kind.model()
    delta = pl.attach(model, method)
    train(kind, model, delta, adam(delta), range(steps))
    return model, delta


def changes(delta: pl.Delta) -> dict[str, Tensor]:
    """D = W' − W of every site, flat."""
    with torch.no_grad():
        return {
            address: (placed.patch.value(placed.site.tensor) - placed.site.tensor).flatten()
            for address, placed in delta.placed.items()
        }


def test_the_first_phase_is_full_fine_tuning() -> None:
    kind = KIND["gpt"]
    model, delta = found(kind, LTSFT(steps=9), 3)
    other = kind.model()
    full = pl.attach(other, pl.FullTuning(targets=list(delta.placed)))
    train(kind, other, full, adam(full), range(3))
    assert torch.equal(kind.run(model, kind.batch()), kind.run(other, kind.batch()))


def test_the_entries_that_moved_most_are_kept_and_all_goes_back() -> None:
    kind, method = KIND["gpt"], LTSFT(steps=3)
    model = kind.model()
    before = kind.run(model, kind.batch())
    _, dense = found(kind, LTSFT(steps=9), 3)
    moved = changes(dense)
    delta = pl.attach(model, method)
    optimizer = adam(delta)
    train(kind, model, delta, optimizer, range(3))
    assert torch.equal(kind.run(model, kind.batch()), before)
    everything = torch.cat([d.abs() for d in moved.values()])
    least = everything.topk(round(0.01 * len(everything))).values[-1]
    train(kind, model, delta, optimizer, range(3, 6))
    for address, d in changes(delta).items():
        assert torch.equal(d != 0, moved[address].abs() >= least)
    assert {id(p) for p in delta.parameters()} == {
        id(p) for group in optimizer.param_groups for p in group["params"]
    }


def test_with_a_new_optimizer_the_second_phase_is_that_of_a_given_mask() -> None:
    kind = KIND["mlp"]
    _, dense = found(kind, LTSFT(steps=9), 3)
    moved = changes(dense)
    shapes = {a: placed.site.shape for a, placed in dense.placed.items()}
    scores = {a: d.abs().view(shapes[a]) for a, d in moved.items()}
    model, delta = found(kind, LTSFT(steps=3, fraction=0.1), 3)
    other = kind.model()
    mask = pl.attach(other, pl.SparseMask(0.1, "given", scores=scores, targets=list(moved)))
    for net, its in ((model, delta), (other, mask)):
        train(kind, net, its, adam(its), range(3, 7))
    for address, d in changes(delta).items():
        close(d, changes(mask)[address], 1e-7)
    assert any(d.any() for d in changes(delta).values())


# -- every search


@SEARCHES
@pytest.mark.parametrize(
    "kind", [k for k in KINDS if not k.name.startswith("hf_") or k.name == "hf_bert"], ids=str
)
def test_what_is_found_is_all_that_a_file_holds(kind: Kind, method: SearchMethod, tmp_path) -> None:
    model, delta = found(kind, method)
    output = kind.run(model, kind.batch())
    pl.save(delta, tmp_path / "a.safetensors")
    size = sum(placed.site.tensor.numel() for placed in delta.placed.values())
    tensors = pl.inspect(tmp_path / "a.safetensors").tensors
    assert {key.rpartition(":")[2] for key in tensors} == {"values", "indices"}
    for name in ("values", "indices"):
        held = [shape for key, (_, shape) in tensors.items() if key.endswith(name)]
        assert sum(n for (n,) in held) == round(0.2 * size) < size
    fresh = copy.deepcopy(model)  # with the running statistics of its norms
    pl.detach(fresh, "default")
    loaded = pl.load(fresh, tmp_path / "a.safetensors", trainable=True)
    assert {(p.numel(),) for p in loaded.parameters()} == {
        shape for key, (_, shape) in tensors.items() if key.endswith("values")
    }
    assert loaded.num_bytes == delta.num_bytes
    assert torch.equal(kind.run(fresh, kind.batch()), output)
    pl.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (
        tmp_path / "again.safetensors"
    ).read_bytes()
    train(kind, fresh, loaded, adam(loaded), range(2))  # nothing is sought any more
    assert not torch.equal(kind.run(fresh, kind.batch()), output)


@SEARCHES
def test_what_is_found_copies_and_merges(method: SearchMethod) -> None:
    kind = KIND["gpt"]
    model, _ = found(kind, method)
    batch = kind.batch()
    output, before = kind.run(model, batch), digest(model)
    twin = copy.deepcopy(model)
    assert torch.equal(kind.run(twin, batch), output)
    pl.merge(model, "default")
    close(kind.run(model, batch), output)
    pl.unmerge(model, "default")
    assert_same(before, digest(model))


@SEARCHES
@pytest.mark.parametrize("at", [1, 3])
def test_training_goes_on_from_a_checkpoint_of_either_phase(method: SearchMethod, at: int) -> None:
    kind = KIND["gpt_fused"]
    whole, _ = found(kind, method, 5)
    model, delta = found(kind, method, 0)
    optimizer = adam(delta)
    train(kind, model, delta, optimizer, range(at))
    other, resumed = found(kind, method, 0)
    resumed.load_state_dict(copy.deepcopy(delta.state_dict()))
    again = adam(resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(kind, other, resumed, again, range(at, 5))
    assert torch.equal(kind.run(other, kind.batch()), kind.run(whole, kind.batch()))
    third = kind.model()
    pl.attach(third, method)
    third.load_state_dict(other.state_dict())
    assert torch.equal(kind.run(third, kind.batch()), kind.run(whole, kind.batch()))


@SEARCHES
def test_a_file_of_the_first_phase_searches_anew(method: SearchMethod, tmp_path) -> None:
    kind = KIND["mlp"]
    model, delta = found(kind, method, 1)
    pl.save(delta, tmp_path / "a.safetensors")
    fresh = kind.model()
    loaded = pl.load(fresh, tmp_path / "a.safetensors", trainable=True)
    assert torch.equal(kind.run(fresh, kind.batch()), kind.run(model, kind.batch()))
    train(kind, fresh, loaded, adam(loaded), range(2))
    size = sum(placed.site.tensor.numel() for placed in loaded.placed.values())
    assert sum(int(d.count_nonzero()) for d in changes(loaded).values()) <= round(0.2 * size)


@SEARCHES
def test_one_graph_serves_both_phases(method: SearchMethod) -> None:
    kind = KIND["mlp"]
    model, delta = found(kind, method, 1)
    torch._dynamo.reset()
    counter = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = adam(delta)
    for step in range(1, 4):
        close(kind.run(compiled, kind.batch()), kind.run(model, kind.batch()))
        train(kind, model, delta, optimizer, range(step, step + 1))
    assert counter.graphs == 1


@SEARCHES
def test_a_patch_for_a_file_takes_no_dense_memory(method: SearchMethod) -> None:
    where = next(s for s in sites(nn.Linear(256, 256)) if s.address == "weight")
    patch = method.build(where)
    assert sum(t.untyped_storage().nbytes() for t in patch.state_dict().values()) < 64
    patch.resize({"values": (5,), "indices": (5,)})
    assert {name: t.shape for name, t in patch.state_dict().items()} == {
        "values": (5,),
        "indices": (5,),
    }


@SEARCHES
def test_rows_of_a_tensor_are_searched_alone(method: SearchMethod) -> None:
    kind = KIND["gpt_fused"]
    model = kind.model()
    delta = pl.attach(model, replace(method, targets="qkv.weight[q]"))
    train(kind, model, delta, adam(delta), range(4))
    for placed in delta.placed.values():
        whole = placed.site.whole
        change = placed.site.module.weight.detach() - whole
        assert not change[len(whole) // 3 :].any()
    assert any(d.any() for d in changes(delta).values())


def test_its_numbers() -> None:
    for wrong, says in (
        ({"steps": 0}, "steps must be a whole number from 1 up, not 0"),
        ({"steps": 1, "fraction": 0}, "fraction must be above 0 and at most 1"),
    ):
        with pytest.raises(pl.PeftliteError, match=says):
            LTSFT(**wrong)
    assert LTSFT(steps=3).fraction == 0.01
    with pytest.raises(pl.TargetError, match=r"takes tensors"):
        pl.attach(KIND["mlp"].model(), LTSFT(steps=1, targets="0()"))
