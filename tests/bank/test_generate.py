"""Generation by transformers: every row keeps its delta through the whole decode."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import peftlite as pl
from peftlite.bank import DeltaBank
from tests.bank.banks import tuned
from tests.zoo import KINDS

ZOO = {kind.name: kind for kind in KINDS}
NAMES = ["a", None, "b", "a"]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "no cache": {"use_cache": False},
}


def _generate(model: Any, ids: torch.Tensor, **way: Any) -> torch.Tensor:
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
        pad_token_id=0, eos_token_id=None, decoder_start_token_id=0, **way,
    )  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["hf_llama", "hf_gpt2", "hf_t5"])
def test_rows_keep_their_delta(name: str, way: str) -> None:
    base: nn.Module = ZOO[name].model()
    alone: dict[str | None, nn.Module] = {None: base}
    model = copy.deepcopy(base)
    bank = DeltaBank(model, 2, 4)
    for i, of in enumerate("ab"):
        alone[of] = tuned(base, pl.LoRA(rank=2 + i), of)
        bank.load(of, pl.deltas(alone[of])[of])
    ids = torch.randint(1, 29, (4, 4))
    with bank.rows(NAMES):
        got = _generate(model, ids, **WAYS[way])
    for i, of in enumerate(NAMES):
        assert torch.equal(got[i], _generate(alone[of], ids[i : i + 1], **WAYS[way])[0])
    plain = _generate(base, ids, **WAYS[way])
    assert not torch.equal(got, plain) and torch.equal(got[1], plain[1])
