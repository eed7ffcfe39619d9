"""One card a method: what it is, how it is tested, and where else in the library it has an answer.

A new method is its file and its card here, in the file of its family. The contract, the golden
files, docs/methods.md and README's table are made of the cards, and test_cards.py asks that every
answer is there and true.
"""

import peftlite as pl
from tests.cards import additive, low_rank, orthogonal, scaling, selective, wrapping
from tests.cards.card import Card, Row

FAMILIES: dict[str, tuple[Card, ...]] = {
    "Low rank": low_rank.CARDS,
    "Orthogonal": orthogonal.CARDS,
    "Additive": additive.CARDS,
    "Scaling": scaling.CARDS,
    "Selective": selective.CARDS,
    "Any of them, behind a learned gate": wrapping.CARDS,
}
"""A section of docs/methods.md each, and a row of README's table."""

CARDS: tuple[Card, ...] = tuple(card for cards in FAMILIES.values() for card in cards)

# deltas of several methods
MIXES = (
    Row(
        "prefix_mix",
        [pl.PrefixTuning(prefix_length=3), pl.LoRA(rank=2)],
        only=("gpt_fused", "hf_gpt2", "hf_llama", "mha_encoder", "mha_decoder", "mha_seq_first"),
        fresh=False,
        way="states",
    ),
    Row(
        "mix",
        [pl.LoRA(targets="*attn*"), pl.BitFit(), pl.FullTuning(targets=["lm_head", "*norm"])],
        only=("gpt", "gpt_fused", "gpt_tied"),
        way="map",
    ),
)

ROWS: tuple[Row, ...] = (*(row for card in CARDS for row in card.rows), *MIXES)

WAYS = {
    "value": "loha",
    "map": "lora",
    "inputs": "hra",
    "entries": "sparse",
    "shared": "vera",
    "parts": "lora_rows",
    "module": "bottleneck",
    "states": "prefix",
    "tokens": "prompt",
}
"""How a method changes a model, as a compiler sees it, and the row that shows it on every kind.

| way | what is traced |
|---|---|
| value | a read of the tensor alone: W' is formed wherever the module asks for its weight |
| map | the call of a linear map, by what it adds to or makes of the output; else as value |
| inputs | the same, by what the map is given: turned or scaled before the product |
| entries | a few entries by their index: gathers and scatters |
| shared | parameters that several sites hold in common: one tensor, lifted once |
| parts | several patches on parts of one tensor, with what is between them |
| module | the call of any module, before or behind it, with whatever it is called with |
| states | the keys and values of an attention: a mode around the call, no tensor of the module |
| tokens | a longer sequence: three patches that pass what they know along the call |
"""

WAY: dict[str, str] = {row.name: row.way or card.way for card in CARDS for row in card.rows}
WAY |= {row.name: row.way for row in MIXES}
"""The way of every row."""
