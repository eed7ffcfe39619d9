"""Checkpoints: whatever stops a training, it goes on to the bit."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import resume
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import peftlite as pl
from peftlite.train import checkpoints, state
from tests.train.test_trainer import Stop, same
from tests.train.tiny import gpt, timeless, trainer, values

MANY: dict[str, Any] = {"save_every": 2, "accumulate": 2, "valid_every": 2}


class Killed(BaseException):
    """What no code catches."""


class Kill:
    """Ends it all at the event of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def start(self, *_: Any) -> None: ...

    def event(self, event: Any) -> None:
        if event["step"] == self.step:
            raise Killed

    def end(self, _: Any) -> None: ...


def content(folder: Path) -> dict[str, bytes]:
    """Every byte of the last checkpoint."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("step-*"))[-1].iterdir()}


def fitted(folder: Path, method: Any, **options: Any) -> tuple[Any, ...]:
    model = gpt(method)
    history = trainer(model, folder, **MANY, **options).fit(resume=True)
    return values(model), timeless(history), content(folder)


LORA = pl.LoRA(rank=2, dropout=0.3)
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA": (LORA, {}),
    "AdaLoRA": (pl.AdaLoRA(init_rank=3, target_rank=1, total_steps=9, t_init=1, t_final=2), {}),
    "fp16": (LORA, {"autocast": "fp16"}),
    "SGD": (LORA, {"optimizer": partial(torch.optim.SGD, momentum=0.9)}),
    "seldom": (LORA, {"check_every": 3}),
}


@pytest.mark.heavy
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_step_it_goes_on_to_the_bit(kind: str, tmp_path: Path) -> None:
    method, options = KINDS[kind]
    expected = fitted(tmp_path / "whole", method, **options)
    for at in (0, 1, 2, 3, 5, 9) if kind == "LoRA" else (1, 4):
        folder = tmp_path / str(at)
        with pytest.raises(Killed):
            fitted(folder, method, callbacks=[Kill(at)], **options)
        found = fitted(folder, method, **options)
        assert same(found[0], expected[0]) and found[1:] == expected[1:], at


@pytest.mark.heavy
def test_kill_minus_9() -> None:
    script, path = resume.__file__, {"PYTHONPATH": str(Path(pl.__file__).parents[1])}
    run = subprocess.run([sys.executable, script, "--quick"], capture_output=True, text=True,
                         env={**os.environ, **path})  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder=folder, **MANY).fit()
    return folder


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize(
    "name",
    ["sql.safetensors", "training.state.json", "training.state.safetensors", "manifest.json"],
)
def test_a_damaged_one_falls_back(
    damage: Callable[[Path], None], name: str, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    damage(folder / "step-00000009-epoch-3" / name)
    with pytest.warns(UserWarning, match="'step-00000009-epoch-3' is not whole"):
        history = trainer(folder=folder, **MANY).fit(resume=True)
    assert content(folder) == content(whole)
    assert history.events[-1]["step"] == 9


def test_what_is_kept(tmp_path: Path) -> None:
    scores = iter([0, 1, 5, 4, 3, 2, 1.0])
    kind = {"probes": {"skill": lambda _: float(next(scores))}, "metric": "skill"}
    history = trainer(folder=tmp_path, epochs=6, save_every=2, keep=2, **kind).fit()
    assert {path.name for path in tmp_path.iterdir()} == {
        "events.jsonl", "step-00000006-epoch-2", "step-00000014", "step-00000015-epoch-5",
        "step-00000016", "step-00000018-epoch-6",
    }  # fmt: skip
    assert history.best == tmp_path / "step-00000006-epoch-2"
    assert {file.suffix for file in history.best.iterdir()} == {".json", ".safetensors"}


def test_older_ones_go_only_when_the_newer_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    write = checkpoints._write

    def watched(path: Path, text: str) -> None:
        seen.append({each.name for each in tmp_path.glob("step-*")})
        write(path, text)

    monkeypatch.setattr(checkpoints, "_write", watched)
    trainer(folder=tmp_path, keep=1).fit()
    assert [len(names) for names in seen] == [1, 1, 2, 2, 2, 2]  # state and manifest of three


def test_a_checkpoint_is_a_delta_to_load(whole: Path) -> None:
    model = gpt()
    pl.detach(model, "sql")
    newest = whole / "step-00000009-epoch-3"
    delta = pl.load(model, newest / "sql.safetensors")
    assert pl.inspect(newest / "sql.safetensors").notes == {"step": 9, "epoch": 3.0}
    trained = gpt()
    trainer(trained, **MANY).fit()
    assert same(dict(delta.state_dict()), values(trained))


def test_it_goes_on_from_the_one_that_is_named(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    trainer(folder=folder, **MANY).fit(resume=folder / "step-00000003-epoch-1")
    assert content(folder) == content(whole)


def test_it_stops_and_goes_on(tmp_path: Path, whole: Path) -> None:
    first = trainer(folder=tmp_path, accumulate=2, valid_every=2, callbacks=[Stop(5)]).fit()
    assert first.stopped == "asked" and (tmp_path / "step-00000005").is_dir()
    second = trainer(folder=tmp_path, accumulate=2, valid_every=2).fit(resume=True)
    assert second.stopped == "done" and content(tmp_path) == content(whole)


def test_killed_in_its_first_checkpoint_it_begins(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for path in (tmp_path / "run").glob("step-*"):
        (path / "manifest.json").unlink()
    trainer(folder=tmp_path / "run", **MANY).fit(resume=True)
    assert content(tmp_path / "run") == content(whole)


def test_what_is_done_is_not_done_again(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    model = gpt()
    history = trainer(model, folder, **MANY).fit(resume=True)
    assert history.stopped == "done" and len(history.events) == 10
    assert content(folder) == content(whole)
    assert history.best is not None and history.best.is_dir()


def test_without_the_log_it_goes_on(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "events.jsonl").write_text('{"torn')
    shutil.rmtree(folder / "step-00000009-epoch-3")
    trainer(folder=folder, **MANY).fit(resume=True)
    assert content(folder) == content(whole)


def test_several_deltas(tmp_path: Path) -> None:
    def two() -> nn.Module:
        model = gpt()
        pl.attach(model, pl.LoRA(rank=1), "chat")
        pl.use(model, ["sql", "chat"])
        return model

    whole, model = two(), two()
    trainer(whole, tmp_path / "whole").fit()
    trainer(two(), tmp_path / "run", callbacks=[Stop(4)]).fit()
    trainer(model, tmp_path / "run").fit(resume=True)
    for name in ("sql", "chat"):
        assert same(values(whole, name), values(model, name))


HOLDING = """
import sys, time
from pathlib import Path
from peftlite.io.files import locking

with locking(Path(sys.argv[1])):
    print(flush=True)
    time.sleep(60)
"""


@pytest.mark.heavy
def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    path = {"PYTHONPATH": str(Path(pl.__file__).parents[1])}
    command = [sys.executable, "-c", HOLDING, str(tmp_path)]
    model = gpt()
    before = values(model)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **path}) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(pl.FileError, match="another Trainer is at work"):
            trainer(model, tmp_path).fit(resume=True)
        assert same(values(model), before) and not any(tmp_path.iterdir())
        other.kill()
    trainer(model, tmp_path).fit(resume=True)


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(TREES, st.integers(0, 9))
def test_trees_come_back(tree: Any, seed: int) -> None:
    given = {"rest": tree, "x": torch.randn(2, generator=torch.Generator().manual_seed(seed))}
    tensors: dict[str, Tensor] = {}
    found = state.unpack(json.loads(json.dumps(state.pack(given, tensors))), tensors)
    assert torch.equal(found.pop("x"), given.pop("x")) and found == given


def test_random_numbers_go_on() -> None:
    def drawn() -> Iterator[float]:
        import random

        import numpy

        for draw in (random.random, lambda: random.gauss(0, 1), numpy.random.randn, torch.rand):
            yield float(draw(1) if draw is torch.rand else draw())

    device = torch.device("cpu")
    list(drawn())
    before = state.random_state(device)
    first = list(drawn())
    state.set_random_state(before, device)
    assert list(drawn()) == first


@pytest.mark.parametrize("several", [True, False])
def test_random_numbers_of_a_device(several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        """One that keeps a number for a generator."""

        state = torch.tensor([7])

        def manual_seed(self, seed: int) -> None:
            self.state = torch.tensor([seed])

        def get_rng_state(self) -> Tensor:
            return self.state

        def set_rng_state(self, state: Tensor) -> None:
            self.state = state

    class Devices(Device):
        manual_seed_all = Device.manual_seed

        def get_rng_state_all(self) -> list[Tensor]:
            return [self.state]

        def set_rng_state_all(self, states: list[Tensor]) -> None:
            (self.state,) = states

    fake = Devices() if several else Device()
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    device = torch.device("cuda")
    with state.fork_rng(device, seed=3):
        assert fake.state == 3
        inside = state.random_state(device)
    assert fake.state == 7
    state.set_random_state(inside, device)
    assert fake.state == 3
