"""Wrapping: any method, behind a learned gate."""

import peftlite as pl
from tests.cards.card import FUSED, Card, Row, layers

CARDS = (
    Card(
        pl.Gated,
        "value",
        (
            Row("gated_lora", pl.Gated(pl.LoRA(rank=2))),
            Row(
                "gated_prefix",
                pl.Gated(pl.PrefixTuning(prefix_length=2)),
                only=("gpt", "mha_encoder", "hf_bert", "hf_llama", "hf_vit"),
                fresh=False,
                way="states",
            ),
            Row(
                "gated_rows",
                pl.Gated(pl.LoRA(rank=2, targets=FUSED)),
                only=("gpt_fused",),
                way="parts",
            ),
            Row(
                "gated_adapter",
                pl.Gated(pl.BottleneckAdapter(bottleneck_size=3, targets=layers)),
                way="module",
            ),
            Row(
                "gated_token",
                pl.Gated(pl.BottleneckAdapter(bottleneck_size=3), per="token"),
                only=("gpt", "hf_bert", "hf_gpt2", "hf_llama", "hf_t5"),
                way="module",
            ),
        ),
        golden=pl.Gated(pl.LoRA(rank=2)),
        bank="linear reading",  # and none at calls: a gate there goes by what is called with
        peft="none: no peer has gates",
        rate="as LoRA's: if it gates LoRA, and otherwise as what it gates",
    ),
)
