"""Tokenizers: bytes there and back, transformers' templates, and which tokens are learned."""

from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers, processors

import peftlite as pl
import peftlite.train.data as data
from tests.train.chats import hf_tokenizer, llama, rows

ASKS = {"role": "user", "content": "Why?"}
SAYS = {"role": "assistant", "content": "So."}

# as the models of these names have them: who speaks, and what surrounds it
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
PLAIN_CHATML = data.CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# what was thought in earlier turns is left out, so a chat doesn't begin as it began
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] + ': ' }}"
    "{% if loop.last %}{{ '<think></think>' }}{% endif %}{{ m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def learned(tokenizer: Any, messages: Any) -> list[str]:
    """The runs of tokens that are learned, as text."""
    ids, mask = data.as_tokenizer(tokenizer).render_with_mask(messages)
    runs, before = [], 0
    for i, m in zip(ids, mask, strict=True):
        if m:
            runs += [[i]] if not before else []
            runs[-1] += [i] if before else []
        before = m
    return [tokenizer.decode(run) for run in runs]


@given(st.binary())
def test_bytes_come_back(raw: bytes) -> None:
    tokenizer = data.ByteTokenizer()
    ids = tokenizer.encode(raw)
    assert tokenizer.to_bytes(ids) == raw and max(ids, default=0) < 256
    assert tokenizer.decode(ids) == raw.decode(errors="replace")


@given(st.text(st.characters()))
def test_texts_come_back(text: str) -> None:
    tokenizer = data.ByteTokenizer()
    assert tokenizer.to_bytes(tokenizer.encode(text)) == text.encode(errors="surrogatepass")


@pytest.mark.heavy
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), st.text())))
def test_no_text_spells_a_role(turns: list[tuple[str, str]]) -> None:
    tokenizer = data.ByteTokenizer()
    ids = tokenizer.render([{"role": r, "content": f"<user><end>{c}"} for r, c in turns])
    assert [tokenizer.specials[i - 256] for i in ids if 256 <= i < 512 and i != 257] == [
        f"<{role}>" for role, _ in turns
    ]
    assert max(ids, default=0) < tokenizer.vocab_size <= 512


def test_bytes_learn_what_the_assistant_says() -> None:
    tokenizer = data.ByteTokenizer()
    for row in rows()[:20]:
        said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert learned(tokenizer, row["messages"]) == said
        by_rule = data.Tokenizer.render_with_mask(tokenizer, row["messages"])
        assert by_rule == tokenizer.render_with_mask(row["messages"])


@pytest.mark.parametrize(
    ("template", "after"),
    [(data.CHATML, "<|im_end|>"), (PLAIN_CHATML, "<|im_end|>\n"), (LLAMA2, " </s>")],
    ids=["markers", "chatml", "llama2"],
)
def test_templates_learn_what_the_assistant_says(template: str, after: str) -> None:
    tokenizer = hf_tokenizer(template)
    for row in rows():
        said = [m["content"] + after for m in row["messages"] if m["role"] == "assistant"]
        assert [run.lstrip() for run in learned(tokenizer, row["messages"])] == said


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "ß"}}}
CALLED = '<tool_call>\n{"name": "f", "arguments": {"x": "ß"}}\n</tool_call>'
NOT_NOW = {**SAYS, "content": "Bad.", "weight": 0}
# two marked texts a message, so that which is which can't be told
TWICE = data.CHATML.replace("{{ '<|im_end|>' }}", "{% endgeneration %}{% generation %}[/INST]")


@pytest.mark.parametrize(
    ("tokenizer", "after"),
    [
        (lambda: data.ByteTokenizer(), ""),
        (lambda: hf_tokenizer(data.CHATML), "<|im_end|>"),
        (lambda: hf_tokenizer(PLAIN_CHATML), "<|im_end|>\n"),
    ],
    ids=["bytes", "markers", "what is added"],
)
def test_what_has_no_weight_is_not_learned(tokenizer: Any, after: str) -> None:
    coder, chat = tokenizer(), [ASKS, NOT_NOW, ASKS, SAYS]
    assert learned(coder, chat) == [f"So.{after}"]
    plain = [{k: v for k, v in m.items() if k != "weight"} for m in chat]
    assert data.as_tokenizer(coder).render(chat) == data.as_tokenizer(coder).render(plain)
    for flag in ({"weight": 0}, {"train": False}, {"weight": 0.0, "train": True}):
        row = {"messages": [ASKS, {**SAYS, "content": "Bad.", **flag}, ASKS, {**SAYS, "train": 1}]}
        (example,), (whole,) = (
            data.chat([row], coder),
            data.chat([row], coder, assistant_only=False),
        )
        for found, lost in ((example, len(example["labels"])), (whole, 0)):
            text = coder.decode([i for i in found["labels"].tolist() if i != -100])
            assert "Bad." not in text and "So." in text and ("Why?" in text) == (not lost)


def test_where_markers_do_not_tell_messages_apart_what_is_added_does() -> None:
    tokenizer = hf_tokenizer(TWICE)
    assert learned(tokenizer, [ASKS, SAYS, ASKS, SAYS]) == ["So.[/INST]"] * 2
    assert learned(tokenizer, [ASKS, NOT_NOW, ASKS, SAYS]) == ["So.[/INST]\n"]


def test_calls_are_written_alike() -> None:
    chat = [ASKS, {**SAYS, "tool_calls": [CALL]}, {"role": "tool", "content": "2"}]
    chat += [{**SAYS, "content": "", "tool_calls": [CALL["function"]] * 2}]
    want = [f"So.\n{CALLED}", f"{CALLED}\n{CALLED}"]
    assert learned(data.ByteTokenizer(), chat) == want
    assert learned(hf_tokenizer(data.CHATML), chat) == [f"{said}<|im_end|>" for said in want]
    coder = data.as_tokenizer(lambda said: list(said.encode()))
    text = hf_tokenizer(data.CHATML).apply_chat_template(chat, tokenize=False)
    assert bytes(coder.render(chat)).decode() == text


TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + data.CHATML
TOOL = {"type": "function", "function": {"name": "turn_wheel"}}


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("markers", [True, False])
def test_tools_reach_the_template(by_name: bool, markers: bool) -> None:
    template: Any = TOOLS if markers else TOOLS.replace(data.CHATML, PLAIN_CHATML)
    if by_name:
        template = {"default": data.CHATML, "tool_use": template}
    tokenizer = hf_tokenizer(template)
    row = {"messages": [ASKS, SAYS], "tools": [TOOL]}
    want = tokenizer.apply_chat_template(row["messages"], tools=[TOOL], tokenize=False)
    for options in ({}, {"assistant_only": False}):
        (example,) = data.chat([row], tokenizer, **options)
        assert tokenizer.decode(example["input_ids"]) == want and "turn_wheel" in want
    assert data.chat([{**row, "tools": None}], tokenizer)[0]["input_ids"].numel() > 0


@pytest.mark.parametrize("tokenizer", [None, hf_tokenizer(data.CHATML)], ids=["bytes", "chatml"])
def test_tools_that_nothing_takes_are_told_of(tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match="'tools' isn't used"):
        data.chat([{"messages": [ASKS, SAYS], "tools": [TOOL]}], tokenizer)


# markers with the space around them that jinja takes away, or is told to
LAID_OUT = (
    "{{ bos_token }}\n{% for m in messages %}\n"
    "  {% if m['role'] == 'assistant' %}\n"
    "    [INST]\n    {% generation %}\n  {{ m['content'] }}\n  {%- endgeneration -%}  \n [/INST]\n"
    "  {%- else %}{{ m['content'] }} {% endif %}\n"
    "{% endfor %}\n"
)


@pytest.mark.parametrize("template", [data.CHATML, LAID_OUT], ids=["chatml", "laid out"])
def test_markers_are_read_as_transformers_reads_them(template: str) -> None:
    tokenizer = hf_tokenizer(template)
    for row in rows():
        theirs = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ours = data.as_tokenizer(tokenizer).render_with_mask(row["messages"])
        assert ours == (theirs["input_ids"], theirs["assistant_masks"])


MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ '[INST]' + m['content'] + '[/INST]' }}{% endif %}{% endfor %}"
)


def test_markers_hold_where_transformers_lets_go_of_them() -> None:
    """At the first token, and at space that is dropped: huggingface/transformers#47325."""
    tokenizer = hf_tokenizer(MARKED)
    assert learned(tokenizer, [SAYS | {"content": "a"}, ASKS, SAYS]) == ["a", "So."]
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\n", "")
    assert learned(tokenizer, [ASKS, SAYS | {"content": "So.\n"}, ASKS, SAYS]) == ["So.", "So."]


def test_without_offsets_a_marked_template_goes_by_what_messages_add() -> None:
    tokenizer = hf_tokenizer(data.CHATML)
    with mock.patch.object(type(tokenizer), "is_fast", False):
        assert learned(tokenizer, [ASKS, SAYS]) == ["So.<|im_end|>\n"]


def test_a_chat_is_what_its_template_writes() -> None:
    tokenizer = hf_tokenizer(LLAMA2)
    messages = rows()[0]["messages"]
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = data.chat(rows(), tokenizer)[0]["input_ids"].tolist()
    assert ids == tokenizer.encode(written, add_special_tokens=False)
    whole = data.chat(rows(), tokenizer, assistant_only=False)[0]
    assert whole["labels"].tolist() == whole["input_ids"].tolist() == ids


def test_a_template_that_forgets_is_refused_or_learned_whole() -> None:
    tokenizer = hf_tokenizer(FORGETFUL)
    with pytest.raises(pl.PeftliteError, match="of message 3 are the assistant's can't be told"):
        data.chat(rows(), tokenizer)[0]
    assert data.chat(rows(), tokenizer, assistant_only=False)[0]["labels"].min() >= 0


def test_a_function_speaks_chatml() -> None:
    tokenizer = hf_tokenizer(data.CHATML)
    messages = rows()[0]["messages"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    coder = data.as_tokenizer(lambda said: list(said.encode()))
    assert bytes(coder.render(messages)).decode() == text
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert bytes(coder.render(messages, prompt=True)).decode() == prompt


@pytest.mark.parametrize(
    "returned", [list, lambda x: {"input_ids": x}, lambda x: x], ids=["list", "dict", "as it is"]
)
def test_whatever_a_function_returns(returned: Any) -> None:
    import torch

    coder = data.as_tokenizer(lambda said: returned(torch.tensor(list(said.encode()))))
    assert coder.encode("abc") == [97, 98, 99]


def test_tokenizers_without_templates_have_encode() -> None:
    tokenizer = hf_tokenizer()
    backend, ids = tokenizer.backend_tokenizer, tokenizer.encode("What is if?")
    assert data.as_tokenizer(backend).encode("What is if?") == ids
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    assert data.as_tokenizer(backend).encode("What is if?") == ids


def test_pairs_end_where_texts_end() -> None:
    tokenizer = hf_tokenizer()
    example = data.pairs([("What is if?", " A statement.")], tokenizer)[0]
    assert tokenizer.decode(example["input_ids"]) == "What is if? A statement.</s>"
    answer = example["labels"][example["labels"] != -100]
    assert tokenizer.decode(answer) == " A statement.</s>"
    both = data.pairs([("What is if?", " A statement.")], tokenizer, response_only=False)[0]
    assert both["labels"].tolist() == both["input_ids"].tolist()


def test_every_id_is_one_the_model_has() -> None:
    example = data.chat(rows(), hf_tokenizer(data.CHATML))[0]
    assert llama()(input_ids=example["input_ids"][None]).logits.isfinite().all()
