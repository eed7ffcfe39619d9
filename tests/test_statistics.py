"""Running statistics: they are the base's, and training a delta doesn't move them."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftlite as pl
from tests.cells import close
from tests.digest import assert_same, bits, digest
from tests.zoo import seeded

X = torch.randn(16, 1, 8, 8) * 3 + 2


def cnn(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    with seeded():
        layers = [nn.Conv2d(1, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4)]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        for _ in range(3):
            model.train()(X)
        return model


class Own(nn.Module):
    """A norm of a user's own, which normalises by a mean and a variance that it keeps."""

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:  # (b, o, h, w)
        if self.training:
            self.running_mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)
            self.running_var.lerp_(x.detach().var((0, 2, 3)), 0.1)
        mean, var = self.running_mean[:, None, None], self.running_var[:, None, None]
        return (x - mean) / (var + 1e-5).sqrt()


NORMS = {
    "batch": nn.BatchNorm2d,
    "cumulative": lambda o: nn.BatchNorm2d(o, momentum=None),
    "instance": lambda o: nn.InstanceNorm2d(o, affine=True, track_running_stats=True),
    "sync": nn.SyncBatchNorm,
    "own": Own,
}
LORA = pl.LoRA(rank=2, targets=["0", "3"])


def train(model: nn.Module, parameters: Any, steps: int = 4) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def buffers(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(b) for name, b in model.named_buffers() if "peftlite" not in name}


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_loop_of_ones_own_moves_nothing_of_the_base(
    norm: str, mode: bool, tmp_path: Path
) -> None:
    model = cnn(NORMS[norm]).train(mode)
    if norm == "sync":
        model.eval()  # in training it wants a process group
    before = digest(model)
    delta = pl.attach(model, LORA, "a")
    train(model, delta.parameters())
    modes = {module: vars(module)["training"] for module in model.modules()}
    assert all(modes[module] for module in model if "training" in vars(module))
    trained = model.eval()(X)
    pl.save(delta, tmp_path / "a")
    fresh = cnn(NORMS[norm]).eval()
    pl.load(fresh, tmp_path / "a")
    close(fresh(X), trained)
    pl.detach(model, "a")
    assert_same(before, digest(model.train(before[": training"])))


def test_it_trains_as_it_is_used() -> None:
    model = cnn().eval()
    pl.attach(model, LORA, "a")
    expected = model(X)
    assert torch.equal(model.train()(X), expected)
    assert not model[1].training and vars(model[1])["training"]
    model[1].training = True  # as some trainers put modes back
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_keeps_them_too(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = cnn()
    pl.attach(model, LORA, "a")
    twin = copied(model)
    before = buffers(twin)
    train(twin, pl.deltas(twin)["a"].parameters())
    assert buffers(twin) == before
    pl.detach(twin, "a")
    assert type(twin[1]) is nn.BatchNorm2d and twin[1].training


def test_they_stay_until_the_last_delta_goes() -> None:
    model = cnn()
    before = buffers(model)
    pl.attach(model, [LORA, pl.NormTuning()], "a")
    pl.attach(model, LORA, "b")
    for name in ("a", "b"):
        pl.use(model, name)
        train(model, pl.deltas(model)[name].parameters())
        assert buffers(model) == before
        pl.detach(model, name)
    model.train()(X)
    assert buffers(model) != before


def test_scales_of_a_batch_norm_are_trained_and_merged() -> None:
    model = cnn()
    delta = pl.attach(model, pl.NormTuning(), "a")
    train(model, delta.parameters())
    expected = model.eval()(X)
    pl.merge(model, "a")
    close(model(X), expected, 1e-5)
    pl.unmerge(model, "a")
    assert torch.equal(model(X), expected)


# -- as peft keeps them


def saved_by_peft(folder: Path, steps: int = 4) -> Tensor:
    config = peft.LoraConfig(r=2, target_modules=["0", "3"], modules_to_save=["1", "4", "7"])
    theirs: Any = peft.get_peft_model(cnn(), config)
    train(theirs, [p for p in theirs.parameters() if p.requires_grad], steps)
    theirs.eval().save_pretrained(str(folder))
    return theirs(X).detach()


def test_peft_has_them_with_a_module_that_it_keeps(tmp_path: Path) -> None:
    expected = saved_by_peft(tmp_path / "theirs")
    model = cnn().eval()
    before, output = digest(model), model(X)
    delta = pl.load(model, tmp_path / "theirs", "a")
    close(model(X), expected, 1e-5)
    again = model(X)
    pl.save(delta, tmp_path / "ours")
    pl.export(delta, tmp_path / "back")
    pl.merge(model, "a")
    close(model(X), expected, 1e-5)
    pl.detach(model, "a")
    assert_same(before, digest(model))
    assert torch.equal(model(X), output)
    pl.load(model, tmp_path / "ours", "b")
    assert torch.equal(model(X), again)
    theirs = peft.PeftModel.from_pretrained(cnn(), str(tmp_path / "back")).eval()
    close(theirs(X), expected, 1e-5)


def test_such_a_delta_trains_on(tmp_path: Path) -> None:
    saved_by_peft(tmp_path / "theirs")
    model = cnn()
    delta = pl.load(model, tmp_path / "theirs", "a", trainable=True)
    before = {name: bits(t) for name, t in delta.named_tensors() if "running" in name}
    train(model, delta.parameters())
    assert all(p.grad is not None for p in delta.parameters())
    assert before == {name: bits(t) for name, t in delta.named_tensors() if "running" in name}


# -- what moves all the same


class Counts(nn.Linear):
    """A layer that keeps an average of what it sees."""

    def __init__(self, i: int, o: int):
        super().__init__(i, o)
        self.register_buffer("seen", torch.zeros(i))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = 0.9 * self.seen + 0.1 * x.detach().mean(0)
        return super().forward(x)


MOVED = (
    r"buffers of the base have moved since deltas were attached: 0\.seen; a delta's file doesn't"
)


@pytest.mark.parametrize(
    "verb",
    [
        lambda model, path: pl.save(pl.deltas(model)["a"], path),
        lambda model, path: pl.export(pl.deltas(model)["a"], path),
        lambda model, path: pl.merge(model, "a"),
        lambda model, path: pl.detach(model, "a"),
    ],
    ids=["save", "export", "merge", "detach"],
)
def test_a_buffer_that_moved_is_named(verb: Callable, tmp_path: Path) -> None:
    model = nn.Sequential(Counts(4, 4), nn.Linear(4, 2))
    pl.attach(model, pl.LoRA(rank=2, targets="1"), "a")
    model.eval()(torch.randn(3, 4))
    verb(copy.deepcopy(model), tmp_path / "still")
    model.train()(torch.randn(3, 4))
    with pytest.warns(UserWarning, match=MOVED) as seen:
        verb(model, tmp_path / "moved")
    assert [Path(warning.filename).name for warning in seen] == [Path(__file__).name]
