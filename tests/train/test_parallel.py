"""Several processes train as one does: the same losses, and the same delta."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import peftlite as pl
from peftlite.cli import main
from tests.conftest import Once
from tests.train import together
from tests.train.chats import hf_tokenizer, llama, rows, write
from tests.train.test_trainer import same
from tests.train.tiny import gpt, timeless, trainer, values
from tests.train.together import CASES, DRY, EQUAL, EVEN, fitted, several

pytestmark = pytest.mark.heavy

KINDS = ("ddp", "fsdp")


TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
    "--max-restarts=1",
]  # fmt: skip
ENVIRONMENT = {
    "PYTHONPATH": str(Path(pl.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # whose processes are started anew
}


def launch(folder: Path) -> None:
    """Has two processes do everything in `together`, all of which comes to a good end."""
    llama().save_pretrained(folder / "model")
    hf_tokenizer(pl.data.CHATML).save_pretrained(folder / "model")
    write(folder / "chats.jsonl", rows()[:24])
    command = [*TORCHRUN, together.__file__, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def ran(once: Once) -> Path:
    """Where two processes left what came of everything in `together`."""
    return once("together", launch)


def found(ran: Path, name: str) -> list[Any]:
    """What came of it, in each process."""
    return [torch.load(ran / f"{name}.{rank}", weights_only=False) for rank in (0, 1)]


def close(a: Any, b: Any) -> None:
    """Trees are the same but for the order in which numbers were summed."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor | float):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            close(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            close(one, other)
    else:
        assert a == b


@pytest.mark.parametrize("name, kind", CASES)
def test_two_processes_train_as_one(name: str, kind: str, ran: Path, tmp_path: Path) -> None:
    make, options = EQUAL[name]
    # of the batch that goes two ways, one process takes a part at a time
    parts = {"accumulate": 2} if name == "forked" else {}
    expected = fitted(make(), tmp_path, **options, **parts)
    first, second = found(ran, f"{name}-{kind}")
    assert same(first["values"], second["values"]) and first["events"] == second["events"]
    close(first["values"], expected["values"])
    close(first["events"], expected["events"])

    # the files are whole, and for the base that one process has
    folder = ran / f"{name}-{kind}"
    assert first["best"] == second["best"] == folder / expected["best"].name
    last = max(folder.glob("step-*"))
    for file in (last / "sql.safetensors", folder / "saved-0.safetensors"):
        plain = make()
        pl.detach(plain, "sql")
        loaded = pl.load(plain, file).saved()
        assert same(loaded, {key: first["values"][key] for key in loaded})
    written = [(folder / f"saved-{rank}.safetensors").read_bytes() for rank in (0, 1)]
    assert written[0] == written[1]


@pytest.mark.parametrize("kind", KINDS)
def test_many_train_at_once_in_two_processes(kind: str, ran: Path, tmp_path: Path) -> None:
    expected = several(0, tmp_path, None)
    first, second = found(ran, f"several-{kind}")
    assert same(first["values"], second["values"]) and first["events"] == second["events"]
    close(first["values"], expected["values"])
    close(first["events"], expected["events"])
    for each in (first, second, expected):
        assert len(each["told"]) == 1 and each["told"][0].startswith("'bad' failed")
    files = (ran / f"several-{kind}").rglob("*.safetensors")
    assert {file.relative_to(ran).parts[1] for file in files} == {"sql", "chat", "code", "bad"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_spread_is_the_base(kind: str, ran: Path) -> None:
    model = EQUAL["llama"][0]()
    own = {name for name, p in model.named_parameters() if not p.requires_grad}
    for each in found(ran, f"llama-{kind}"):
        assert set(each["spread"]) == (own if kind == "fsdp" else set())


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_to_the_bit(kind: str, ran: Path) -> None:
    """With dropout, which differs between the processes."""
    both = found(ran, f"resumed-{kind}")
    for each in both:
        assert each["stopped"] == "asked"
        assert same(each["values"], each["whole"]["values"])
        assert each["events"] == each["whole"]["events"]
    assert same(both[0]["values"], both[1]["values"])
    files = [(ran / f"resumed-{kind}" / run).rglob("step-*/*") for run in ("whole", "again")]
    whole, again = ({f.name: f.read_bytes() for f in sorted(each)} for each in files)
    assert whole == again


def test_all_begin_with_the_first_ones_delta(ran: Path, tmp_path: Path) -> None:
    first, second = found(ran, "unseeded")
    assert same(first["values"], second["values"]) and first["events"] == second["events"]


def test_fp16_with_parts(ran: Path) -> None:
    first, second = found(ran, "scaled")
    assert same(first["values"], second["values"]) and first["events"] == second["events"]
    assert all(event["train_loss"] is not None for event in first["events"][1:])


def test_probes_run_in_all_and_callbacks_in_the_first(ran: Path) -> None:
    first, second = found(ran, "probed")
    assert first["told"] == list(range(7)) and second["told"] == []
    for each in (first, second):  # by the first one's score, which never rises
        assert each["asked"] == 3 and each["stopped"] == "early"


def test_a_spread_model_goes_on(ran: Path) -> None:
    for each in found(ran, "again"):
        torch.testing.assert_close(each["off"], each["base"])
        torch.testing.assert_close(each["detached"], each["base"])
        torch.testing.assert_close(each["merged"], each["on"])
        assert not torch.allclose(each["on"], each["off"])


def test_restarted_by_torchrun_it_goes_on_to_the_bit(ran: Path) -> None:
    whole = found(ran, "resumed-ddp")[0]["whole"]
    for each in found(ran, "restarted"):
        assert each["restarts"] == "1"
        assert same(each["values"], whole["values"]) and each["events"] == whole["events"]


def test_a_search_in_two_processes(ran: Path) -> None:
    first, second = found(ran, "searched")
    assert first == second and [row["state"] for row in first] == ["done"] * 3
    assert len((ran / "searched" / "trials").read_text().splitlines()) == 4


def test_a_loss_that_is_not_finite_in_one_ends_both(ran: Path) -> None:
    both = found(ran, "not_finite")
    for rank, each in enumerate(both):
        assert "at step 2 the loss is inf" in each["told"] or "nan" in each["told"]
        assert f"not-finite-00000002-of-{rank}.safetensors" in each["told"]
        assert (ran / f"not_finite/not-finite-00000002-of-{rank}.safetensors").exists()
    assert same(both[0]["values"], both[1]["values"])
    assert not same(both[0]["values"], values(gpt(DRY)))  # after the first step


@pytest.mark.parametrize(
    "name, told",
    [
        ("other_base", "the models of process 0 and of process 1 differ: lm_head.weight"),
        ("other_settings", "the settings of process 0 and of process 1 differ: lr is 0.001"),
        (
            "other_fields",
            "the losses of process 0 and of process 1 differ: fields is count; loss; correct",
        ),
        ("own_shards", "leave fully_shard to Trainer"),
        ("no_folder", "no_folder"),
    ],
)
def test_what_is_refused_is_refused_in_both(name: str, told: str, ran: Path) -> None:
    first, second = found(ran, name)
    assert told in first and first == second


def test_one_process_is_told_of_torchrun(tmp_path: Path) -> None:
    for kind in KINDS:
        with pytest.raises(pl.PeftliteError, match="torchrun --nproc-per-node=N"):
            trainer(parallel=kind)
    alone = trainer(parallel=None)
    assert timeless(alone.fit()) == timeless(trainer().fit())


def test_a_checkpoint_of_two_is_not_gone_on_with_by_one(ran: Path, tmp_path: Path) -> None:
    run = trainer(gpt(DRY, torch.float64), tmp_path, **EVEN)
    with pytest.raises(pl.FileError, match="processes=2"):
        run.fit(resume=ran / "uneven-ddp" / "step-00000009-epoch-3")


def test_the_command_line(
    ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file, one report, and what one process leaves."""
    monkeypatch.chdir(ran)
    one = tmp_path / "one"
    assert main([*together.TRAIN, str(one)]) == 0
    alone = json.loads(capsys.readouterr().out)
    for kind in KINDS:
        (code, told), silent = found(ran, f"command-{kind}")
        assert code == 0 and silent == (0, "")
        assert json.loads(told)["settings"] == {**alone["settings"], "processes": 2}
        folder = ran / f"command-{kind}"
        assert {path.name for path in folder.iterdir()} == {path.name for path in one.iterdir()}
        # AdamW makes much of the least gradients: in fp32 their last bits show
        values = (load_file(each / "one.safetensors") for each in (folder, one))
        torch.testing.assert_close(*values, rtol=0, atol=1e-3)
