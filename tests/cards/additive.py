"""Additive: modules, tokens and states that the base doesn't have."""

import peftlite as pl
from tests.cards.card import Card, Row, called, layers

NO_IDS = {
    kind: "takes the one call of a module that looks up its token ids in an nn.Embedding"
    for kind in (
        "mlp mha_encoder mha_decoder mha_seq_first shared experts raw bilinear conv1d "
        "conv2d_grouped conv2d_same conv3d conv_transpose embedding_bag lstm gru weight_norm "
        "conv1d_hf norms hf_vit"
    ).split()
}

NO_ATTENTION = {
    kind: "PrefixTuning takes none of this model's sites by default"
    for kind in (
        "mlp shared experts packed raw bilinear conv1d conv2d_grouped conv2d_same conv3d "
        "conv_transpose embedding embedding_bag lstm gru weight_norm conv1d_hf norms".split()
    )
}

CARDS = (
    Card(
        pl.BottleneckAdapter,
        "module",
        (
            # blocks and the root too
            Row("bottleneck", pl.BottleneckAdapter(bottleneck_size=3, targets=called)),
            Row(
                "bottleneck_parallel",
                pl.BottleneckAdapter(
                    preset="parallel", reduction_factor=4, scale=0.5, targets=layers
                ),
                refused={
                    kind: "is true for none of the 0 sites offered"
                    for kind in "conv1d conv2d_grouped conv2d_same conv3d conv_transpose".split()
                },
            ),
            Row(
                "bottleneck_pfeiffer",
                pl.BottleneckAdapter(preset="pfeiffer", bottleneck_size=3),
                only=("gpt", "mha_encoder", "hf_bert", "hf_vit", "hf_t5"),
            ),
        ),
        golden=pl.BottleneckAdapter(bottleneck_size=2),
        bank="bottleneck",
        peft="none: peft has none",
        rate=2,
        variants="Houlsby, Pfeiffer, parallel",
    ),
    Card(
        pl.Compacter,
        "module",
        (
            Row(
                "compacter",
                pl.Compacter(scale=0.1, targets=called),
                refused={
                    kind: "is true for none of the 0 sites offered"
                    for kind in "experts raw conv1d conv2d_same conv3d lstm gru".split()
                },
            ),
            Row(
                "compacter_plus",
                pl.Compacter(preset="compacter++", phm_dim=2, phm_rank=2, reduction_factor=4),
                only=("gpt", "hf_bert", "hf_gpt2", "hf_llama", "hf_t5"),
            ),
        ),
        golden=pl.Compacter(reduction_factor=4, phm_dim=2),
        bank="bottleneck",
        peft="none: peft has none",
        rate=3,
    ),
    Card(
        pl.PrefixTuning,
        "states",
        (
            Row("prefix", pl.PrefixTuning(prefix_length=3), refused=NO_ATTENTION, fresh=False),
            Row(
                "prefix_reparametrized",
                pl.PrefixTuning(prefix_length=3, reparametrize=True, hidden_size=7),
                refused=NO_ATTENTION,
                fresh=False,
            ),
            Row(
                "prefix_shifted",
                pl.PrefixTuning(prefix_length=2, positions="shifted"),
                only=("hf_bert", "hf_gpt2", "hf_llama", "hf_t5"),
                fresh=False,
            ),
        ),
        golden=pl.PrefixTuning(prefix_length=2),
        bank="prefix",
        peft="PREFIX_TUNING",
        as_peft=pl.PrefixTuning(prefix_length=2, positions="shifted"),
        rate=30,
    ),
    Card(
        pl.PromptTuning,
        "tokens",
        (Row("prompt", pl.PromptTuning(prompt_length=2), refused=NO_IDS, fresh=False),),
        golden=pl.PromptTuning(prompt_length=2),
        bank="prompt",
        peft="PROMPT_TUNING",
        rate=30,
    ),
    Card(
        pl.PTuning,
        "tokens",
        (
            Row(
                "ptuning",
                pl.PTuning(prompt_length=2, hidden_size=5),
                refused=NO_IDS,
                fresh=False,
            ),
            Row(
                "ptuning_lstm",
                pl.PTuning(prompt_length=2, encoder="lstm"),
                only=("gpt", "hf_bert", "hf_t5"),
                fresh=False,
            ),
        ),
        golden=pl.PTuning(prompt_length=2, hidden_size=4),
        bank="prompt",
        peft="PROMPT_TUNING",  # the rows that its network gives
        rate="as LoRA's: a network learns, not the rows, and of that 0.9 was best for the byte "
        "model (benchmarks/results/quality.csv)",
    ),
    Card(
        pl.LoReFT,
        "module",
        (
            Row("loreft", pl.LoReFT(rank=2, targets=called), fresh=False),
            Row(
                "loreft_positions",
                pl.LoReFT(rank=3, positions="f2+l1", init="identity"),
                only=tuple(
                    "gpt gpt_fused gpt_tied mha_encoder hf_bert hf_gpt2 hf_llama hf_t5 "
                    "hf_vit".split()
                ),
            ),
        ),
        golden=pl.LoReFT(rank=2),
        bank="loreft",
        peft="none: pyreft has it, not peft",
        rate=3,
    ),
    Card(
        pl.ScalarHead,
        "module",
        (
            Row(
                "scalar_head",
                pl.ScalarHead(),
                only=("gpt", "gpt_tied", "hf_llama"),
                fresh=False,
                shaped=False,
            ),
        ),
        golden=pl.ScalarHead(),
        bank="none: it gives another shape than the base, and rows of a batch have one",
        peft="none: there it is a module of the base, AutoModelForSequenceClassification's",
        rate="as LoRA's: a probe on fixed features, whose rate was not measured",
    ),
)
