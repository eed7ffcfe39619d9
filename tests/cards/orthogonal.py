"""Orthogonal: W' = W R, which turns what a map is given."""

import peftlite as pl
from tests.cards.card import FUSED, Card, Row, anywhere

CARDS = (
    Card(
        pl.OFT,
        "inputs",
        (
            Row("oft", pl.OFT(block_size=4)),
            Row(
                "oft_anywhere",
                pl.OFT(block_size=5, neumann_terms=3, eps=0.3, targets=anywhere),
                only=("gpt_tied", "experts", "conv_transpose", "embedding", "raw", "bilinear"),
            ),
            Row(
                "oft_outputs",
                pl.OFT(block_size=4, outputs=True, targets=anywhere),
                only=("gpt", "conv2d_grouped", "experts"),
                way="value",
            ),
            Row("oft_rows", pl.OFT(block_size=4, targets=FUSED), only=("gpt_fused",), way="parts"),
        ),
        golden=pl.OFT(block_size=2),
        bank="linear reading",
        peft="OFT",
        rate=0.5,
    ),
    Card(
        pl.BOFT,
        "value",
        (
            Row("boft", pl.BOFT(m=1)),
            Row(
                "boft_butterfly", pl.BOFT(block_size=2, m=2), only=("gpt", "gpt_fused", "hf_llama")
            ),
            Row("boft_outputs", pl.BOFT(block_size=2, m=2, outputs=True), only=("gpt",)),
            Row(
                "boft_refused",
                pl.BOFT(m=2),
                refused={
                    "mlp": "BOFT takes tensors of 2 or more dimensions, their inputs a multiple"
                },
                only=("mlp",),
            ),
        ),
        golden=pl.BOFT(block_size=2, m=2),
        bank="linear reading",
        peft="BOFT",
        rate="as LoRA's: 1 to 2 times it was best on three small models "
        "(benchmarks/results/quality.csv)",
    ),
    Card(
        pl.HRA,
        "inputs",
        (
            Row("hra", pl.HRA(rank=4)),
            Row(
                "hra_anywhere",
                pl.HRA(rank=2, targets=anywhere),
                only=("experts", "conv_transpose", "embedding"),
            ),
        ),
        golden=pl.HRA(rank=2),
        bank="linear reading",
        peft="HRA",
        rate=2,
    ),
)
