"""What outlives what: a model is freed without garbage collection, a file serves a new process."""

import copy
import gc
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import peftlite as pl
from tests.digest import assert_same, digest
from tests.zoo import KINDS, seeded

ZOO = {kind.name: kind for kind in KINDS}

ELSEWHERE = """
import sys, torch
import peftlite as pl
from tests.zoo import KINDS

kind = {kind.name: kind for kind in KINDS}[sys.argv[1]]
torch.set_num_threads(1)
model = kind.model()
pl.load(model, sys.argv[2], trainable=True)
torch.save(kind.run(model, kind.batch()).detach(), sys.argv[3])
"""


@pytest.mark.parametrize("name", ["mlp", "gpt_tied", "mha_decoder", "lstm"])
def test_a_model_with_deltas_is_freed_at_once(name: str) -> None:
    model = ZOO[name].model()
    pl.attach(model, pl.LoRA(rank=2), name="a")
    pl.attach(model, pl.FullTuning(), name="b")
    with pl.using(model, ["a", "b"]):
        ZOO[name].run(model, ZOO[name].batch()).sum().backward()
    pl.merge(model, "b")
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["mlp", "hf_llama"])
def test_a_file_gives_the_same_bits_in_another_process(name: str, tmp_path: Path) -> None:
    kind, model = ZOO[name], ZOO[name].model()
    with seeded(1), torch.no_grad():
        delta = pl.attach(
            model, [pl.LoRA(rank=2), pl.FullTuning(targets="*norm*")][: 1 + (name != "mlp")]
        )
        for parameter in delta.parameters():
            parameter.add_(torch.randn_like(parameter))
    pl.save(delta, tmp_path / "a.safetensors")
    arguments = [name, str(tmp_path / "a.safetensors"), str(tmp_path / "y")]
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments], check=True, cwd=Path(__file__).parents[1]
    )
    assert torch.equal(torch.load(tmp_path / "y"), kind.run(model, kind.batch()))


@pytest.mark.parametrize("name", ["training", "forward", "choice", "registry", "kind"])
def test_a_delta_may_be_called_what_a_module_has(name: str) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3)
    before, base = digest(model), model(x)
    delta = pl.attach(model, pl.LoRA(rank=1), name)
    next(p for key, p in delta.named_parameters() if key.endswith(":b")).data.fill_(1.0)
    model.eval().train()
    pl.use(model, None)
    assert torch.equal(model(x), base)
    pl.use(model, name)
    assert not torch.equal(copy.deepcopy(model)(x), base)
    pl.detach(model, name)
    assert_same(before, digest(model))


def test_a_checkpoint_with_more_or_less_of_a_delta_is_no_checkpoint_of_it() -> None:
    model = ZOO["mlp"].model()
    pl.attach(model, pl.LoRA(rank=2), "sql")
    whole = model.state_dict()
    first = next(key for key in whole if "sql" in key)
    less = {key: tensor for key, tensor in whole.items() if key != first}
    with pytest.raises(RuntimeError, match=re.escape(f'Missing key(s) in state_dict: "{first}"')):
        model.load_state_dict(less)
    with pytest.raises(
        RuntimeError, match=re.escape(f'Unexpected key(s) in state_dict: "{first}x')
    ):
        model.load_state_dict({**whole, f"{first}x": whole[first]})
