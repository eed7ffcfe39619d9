"""Selective: some of the base's own numbers."""

import peftlite as pl
from tests.cards.card import FUSED, Card, Row, anywhere

CARDS = (
    Card(
        pl.BitFit,
        "value",
        (
            Row(
                "bitfit",
                pl.BitFit(),
                refused={
                    kind: "BitFit takes none of this model's sites by default"
                    for kind in ("hf_llama", "hf_t5")
                },
            ),
            Row(
                "bitfit_added",
                pl.BitFit(add_missing=True),
                only=("mlp", "gpt", "conv2d_same", "bilinear", "hf_llama", "hf_t5"),
                way="module",
            ),
        ),
        golden=pl.BitFit(),
        bank="vectors reading",
        peft="LN_TUNING",  # whole tensors, as any change of them
        rate=3,
    ),
    Card(
        pl.NormTuning,
        "value",
        (
            Row(
                "norm",
                pl.NormTuning(),
                refused={
                    kind: "NormTuning takes none of this model's sites by default"
                    for kind in (
                        "mlp mha_seq_first shared experts raw bilinear conv1d conv2d_grouped "
                        "conv2d_same conv3d conv_transpose embedding embedding_bag lstm gru "
                        "weight_norm conv1d_hf"
                    ).split()
                },
            ),
        ),
        golden=pl.NormTuning(),
        bank="vectors",
        peft="LN_TUNING",
        rate=4,
    ),
    Card(
        pl.SparseMask,
        "entries",
        (
            Row("sparse", pl.SparseMask(fraction=0.2)),
            Row(
                "sparse_rows",
                pl.SparseMask(fraction=0.3, targets=FUSED),
                only=("gpt_fused",),
                way="parts",
            ),
        ),
        golden=pl.SparseMask(fraction=0.05),
        bank="sparse reading",
        peft="none: peft's entries are as many at each module, and drawn",
        rate=2,
        variants="magnitude, random, FISH, given",
    ),
    Card(
        pl.SHiRA,
        "entries",
        (Row("shira", pl.SHiRA(rank=1)),),
        golden=pl.SHiRA(rank=1),
        bank="sparse reading",
        peft="SHIRA",
        rate="as LoRA's: 1 to 4 times it was best on three small models "
        "(benchmarks/results/quality.csv)",
    ),
    Card(
        pl.LTSFT,
        "value",
        (
            Row("ltsft", pl.LTSFT(steps=10)),
            Row("ltsft_rows", pl.LTSFT(steps=10, targets=FUSED), only=("gpt_fused",), way="parts"),
        ),
        golden=pl.LTSFT(steps=9, targets="v_proj"),
        bank="sparse vectors reading",
        peft="none: peft has none",
        rate="as LoRA's: its first half tunes all entries, for which 0.1 is known, its second a "
        "few, which want more",
    ),
    Card(
        pl.DiffPruning,
        "value",
        (
            Row("diff_pruning", pl.DiffPruning(steps=10)),
            Row(
                "diff_pruning_structured",
                pl.DiffPruning(steps=10, structured=True, targets=anywhere),
                only=("mlp", "raw", "experts", "conv1d_hf", "lstm", "gpt_tied"),
            ),
            Row(
                "diff_pruning_rows",
                pl.DiffPruning(steps=10, targets=FUSED),
                only=("gpt_fused",),
                way="parts",
            ),
        ),
        golden=pl.DiffPruning(steps=9, targets="v_proj"),
        bank="sparse vectors reading",
        peft="none: peft has none",
        rate="as LoRA's: its gates want more than its entries, and neither was measured",
    ),
    Card(
        pl.FullTuning,
        "value",
        (
            Row("full", pl.FullTuning()),
            Row(
                "full_top",
                pl.FullTuning(top_layers=1),
                refused={
                    "raw": "top_layers goes by the numbers of layers in a list: there are none"
                },
                only=("mlp", "gpt", "hf_t5", "raw"),
            ),
        ),
        golden=pl.FullTuning(targets="q_proj"),
        bank="linear vectors reading",
        peft="LN_TUNING",  # whole tensors
        rate=0.1,
    ),
)
