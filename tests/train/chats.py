"""Real chats, and tokenizers and a model that need no download."""

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.zoo import seeded

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]


def rows() -> list[dict[str, Any]]:
    """What `help()` says of Python's topics, as chats of two turns, each with its first letter."""
    return [
        {"messages": _chat(topic, *_paragraphs(topics[topic])), "letter": topic[0]}
        for topic in sorted(topics)
    ]


def _paragraphs(text: str) -> list[str]:
    found = [p.strip() for p in re.split(r"\n\n+", text) if len(p.strip()) > 40]
    return (found * 2)[:2]


def _chat(topic: str, first: str, second: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "You know Python."},
        {"role": "user", "content": f"What is {topic}?", "name": "ada"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Go on."},
        {"role": "assistant", "content": second},
    ]


def write(path: Path, lines: Sequence[Any]) -> Path:
    """A JSONL file: bytes as they are, the rest as JSON."""
    data = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in data))
    return path


@functools.cache
def _trained() -> str:
    """Byte-level BPE, trained on the topics."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(topics.values(), trainer)
    return bpe.to_str()


def hf_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template,
    )  # fmt: skip


def llama(**options: Any) -> LlamaForCausalLM:
    """A small Llama with grouped heads, as transformers makes one: with its cache on."""
    with seeded():
        config = LlamaConfig(
            vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, **options,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()
