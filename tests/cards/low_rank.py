"""Low rank: W' = W + ΔW, where ΔW has few numbers behind it."""

import peftlite as pl
from tests.cards.card import FIXED, FUSED, UNUSUAL, Card, Row, anywhere

CARDS = (
    Card(
        pl.LoRA,
        "map",
        (
            Row("lora", pl.LoRA(rank=3, alpha=5)),
            Row("lora_anywhere", pl.LoRA(rank=2, scaling="rslora", targets=anywhere)),
            Row(
                "lora_fa",
                pl.LoRA(rank=3, freeze_a=True, targets=anywhere),
                only=("mlp", "embedding", "experts", "conv2d_grouped", "conv1d_hf"),
            ),
            Row("lora_pissa", pl.LoRA(rank=2, init="pissa")),
            Row(
                "lora_olora",
                pl.LoRA(rank=2, init="olora", targets=anywhere),
                only=("conv1d_hf", "raw"),
            ),
            Row("lora_rows", pl.LoRA(rank=2, targets=FUSED), only=("gpt_fused",), way="parts"),
            Row(
                "lora_attention",
                pl.LoRA(rank=2, targets=["*in_proj_weight[q]", "*in_proj_weight[v]", "out_proj"]),
                only=("mha_encoder", "mha_seq_first"),
                way="parts",
            ),
        ),
        golden=pl.LoRA(rank=2, alpha=3),
        bank="low_rank conv reading",
        peft="LORA",
        rate="as LoRA's: the rule is for it",
        variants="rsLoRA, LoRA-FA, LoRA+; kaiming, gaussian, orthogonal, PiSSA, OLoRA, EVA, "
        "LoRA-GA, CorDA, LoftQ starts",
    ),
    Card(
        pl.DoRA,
        "map",
        (
            Row("dora", pl.DoRA(rank=3, alpha=5)),
            Row("dora_anywhere", pl.DoRA(rank=2, scaling="rslora", targets=anywhere)),
            Row(
                "dora_pissa",
                pl.DoRA(rank=2, init="pissa"),
                only=("mlp", "conv1d_hf", "conv2d_grouped", "conv_transpose"),
            ),
            Row("dora_rows", pl.DoRA(rank=2, targets=FUSED), only=("gpt_fused",), way="parts"),
            Row(
                "dora_inputs",
                pl.DoRA(rank=2, targets=["0.weight[1:5]", "2.weight[:, 1:4]"]),
                only=("conv1d_hf", "mlp"),
                way="parts",
            ),
        ),
        golden=pl.DoRA(rank=2),
        bank="low_rank reading",
        peft="LORA",
        rate="as LoRA's: its factors are LoRA's at LoRA's scale, and count so",
    ),
    Card(
        pl.AdaLoRA,
        "map",
        (
            Row("adalora", pl.AdaLoRA(init_rank=3, target_rank=2, alpha=5, total_steps=10)),
            Row(
                "adalora_anywhere",
                pl.AdaLoRA(init_rank=3, target_rank=2, total_steps=10, targets=anywhere),
                only=("experts", "conv_transpose", "embedding", "raw", "conv1d_hf", "lstm"),
            ),
            Row(
                "adalora_rows",
                pl.AdaLoRA(init_rank=3, target_rank=2, total_steps=10, targets=FUSED),
                only=("gpt_fused",),
                way="parts",
            ),
        ),
        golden=pl.AdaLoRA(init_rank=3, target_rank=2, total_steps=9),
        bank="low_rank conv reading",
        peft="ADALORA",
        rate=3,
    ),
    Card(
        pl.VeRA,
        "shared",
        (
            Row("vera", pl.VeRA(rank=5)),
            Row("vera_anywhere", pl.VeRA(rank=4, targets=anywhere)),
            Row("vera_rows", pl.VeRA(rank=5, targets=FUSED), only=("gpt_fused",), way="parts"),
        ),
        golden=pl.VeRA(rank=2),
        bank="low_rank conv reading",
        peft="VERA",
        rate=15,
    ),
    Card(
        pl.VBLoRA,
        "shared",
        (
            Row("vblora", pl.VBLoRA(vector_length=5, num_vectors=12), fresh=False),
            Row(
                "vblora_anywhere",
                pl.VBLoRA(
                    rank=2,
                    vector_length=4,
                    num_vectors=9,
                    topk=3,
                    save_only_topk_weights=True,
                    targets=anywhere,
                ),
                only=UNUSUAL,
                fresh=False,
            ),
            Row(
                "vblora_rows",
                pl.VBLoRA(vector_length=4, num_vectors=8, targets=FUSED),
                only=("gpt_fused",),
                fresh=False,
                way="parts",
            ),
        ),
        golden=pl.VBLoRA(rank=2, num_vectors=8, vector_length=4),
        bank="low_rank conv reading",
        peft="VBLORA",
        rate=4,
    ),
    Card(
        pl.LoHa,
        "value",
        (
            Row("loha", pl.LoHa(rank=3, alpha=5)),
            Row("loha_anywhere", pl.LoHa(rank=2, targets=anywhere)),
        ),
        golden=pl.LoHa(rank=2),
        bank="linear reading",
        peft="LOHA",
        rate=4,
    ),
    Card(
        pl.HiRA,
        "value",
        (
            Row("hira", pl.HiRA(rank=3)),
            Row("hira_anywhere", pl.HiRA(rank=2, targets=anywhere)),
        ),
        golden=pl.HiRA(rank=2),
        bank="linear reading",
        peft="HIRA",
        rate=12,
    ),
    Card(
        pl.LoKr,
        "map",
        (
            Row("lokr", pl.LoKr(rank=1, alpha=2, decompose_both=True)),
            Row("lokr_anywhere", pl.LoKr(rank=2, factor=2, targets=anywhere)),
            Row("lokr_rows", pl.LoKr(rank=2, targets=FUSED), only=("gpt_fused",), way="parts"),
        ),
        golden=pl.LoKr(rank=2),
        bank="linear reading",
        peft="LOKR",
        rate=8,
    ),
    Card(
        pl.FourierFT,
        "value",  # the call of a map is for matrices larger than the contract's
        (
            Row("fourier", pl.FourierFT(n=30, alpha=8), fresh=False),
            Row(
                "fourier_anywhere",
                pl.FourierFT(n=21, alpha=6, init="zero", targets=anywhere),
                only=UNUSUAL,
            ),
            Row(
                "fourier_rows",
                pl.FourierFT(n=20, alpha=8, targets=FUSED),
                only=("gpt_fused",),
                fresh=False,
                way="parts",
            ),
        ),
        golden=pl.FourierFT(n=9),
        bank="linear reading",
        peft="FOURIERFT",
        rate=FIXED,
    ),
)
