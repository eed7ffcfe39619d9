"""Chat files: every problem by its line, in one pass and little memory; and what is read."""

import json
import pickle
import re
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftlite as pl
import peftlite.train.data as data
from peftlite.train.data import jsonl, readers
from tests.train.chats import hf_tokenizer, rows, write


def chat(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": said} for role, said in turns], **more}


def good(i: int = 0) -> dict[str, Any]:
    return chat(("user", f"Question {i}?"), ("assistant", f"Answer {i}."))


def messages(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


ASKS = {"role": "user", "content": "Why?"}
SAYS = {"role": "assistant", "content": "So."}
FUNCTION = {"name": "f", "arguments": '{"x": 1}'}
CALL = {"type": "function", "function": FUNCTION}

# a line, and the kinds of problems that it has
LINES: list[tuple[Any, list[str]]] = [
    (good(), []),
    (messages(ASKS, {**SAYS, "name": "ada"}), []),
    (messages({**ASKS, "role": "tool"}, SAYS), []),
    ({**good(1), "letter": "a"}, []),
    (b'{"messages": [}', ["JSON"]),
    (b"[" * 100_000, ["JSON"]),
    (b'{"messages": ' + b"9" * 5000 + b"}", ["JSON"]),
    (b'{"messages": NaN}', ["JSON"]),
    (b'{"messages": []} {}', ["JSON"]),
    (b"[]", ["JSON"]),
    (b'"messages"', ["JSON"]),
    (b"null", ["JSON"]),
    (b"\xff\xfe{}", ["encoding"]),
    ("Größe".encode("latin-1"), ["encoding"]),
    (json.dumps(messages(ASKS, {**SAYS, "content": "\ud800"})).encode(), ["encoding"]),
    (b'{"messages": [], "messages": []}', ["duplicate key", "messages"]),
    (b'{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}', ["duplicate key"]),
    (b"", ["blank line"]),
    (b" \t\r", ["blank line"]),
    ({}, ["messages"]),
    ({"prompt": "a", "response": "b"}, ["messages"]),
    ({"messages": "Why?"}, ["messages"]),
    (messages(), ["messages"]),
    (messages("Why?", SAYS), ["messages"]),
    (messages({"content": "Why?"}, SAYS), ["role"]),
    (messages({**ASKS, "role": "bot"}, SAYS), ["role"]),
    (messages({**ASKS, "role": ["user"]}, SAYS), ["role"]),
    (messages({"role": "user"}, SAYS), ["content"]),
    (messages({**ASKS, "content": None}, SAYS), ["content"]),
    (messages({**ASKS, "content": ""}, SAYS), ["content"]),
    (messages({**ASKS, "content": " \n"}, SAYS), ["content"]),
    (messages({**ASKS, "content": [{"type": "text", "text": "Why?"}]}, SAYS), []),
    (messages({**ASKS, "content": [{"type": "image_url", "image_url": {}}]}, SAYS), ["content"]),
    (messages({**ASKS, "content": []}, SAYS), ["content"]),
    (messages({**ASKS, "role": "developer", "name": None}, ASKS, SAYS), []),
    (messages({**ASKS, "content": "2", "role": "function", "name": "f"}, SAYS), []),
    (messages(ASKS, {"role": "assistant", "content": None, "tool_calls": [CALL]}), []),
    (messages(ASKS, {"role": "assistant", "content": "Look.", "function_call": FUNCTION}), []),
    (messages(ASKS, {**SAYS, "tool_calls": ["f"]}), ["tool_calls"]),
    (messages(ASKS, {**SAYS, "tool_calls": "f"}), ["tool_calls"]),
    (messages(ASKS, {**SAYS, "weight": 0, "refusal": None}, ASKS, SAYS), []),
    (messages({**ASKS, "train": False}, {**SAYS, "train": True, "name": "a"}), []),
    (messages(ASKS, {**SAYS, "weight": 0}), ["weight"]),
    (messages(ASKS, {**SAYS, "weight": 0.5}), ["weight"]),
    (messages({**ASKS, "train": True}, SAYS), ["train"]),
    ({**good(2), "tools": [CALL]}, ["unused tools"]),
    ({**good(3), "tools": json.dumps([CALL])}, ["unused tools"]),
    ({**good(4), "functions": [FUNCTION]}, ["unused tools"]),
    ({**good(5), "tools": "f"}, ["tools"]),
    ({**good(6), "tools": None}, []),
    ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So!"}]}, []),
    ({"conversations": [{"from": "gpt", "value": "So."}, {"from": "human", "value": "Why?"}]},
     ["last message"]),
    ({"prompt": [ASKS], "completion": [{**SAYS, "content": "Indeed."}]}, []),
    ({"prompt": [ASKS], "completion": [SAYS], "label": False}, ["messages"]),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["messages"]),
    (messages({**ASKS, "name": 3}, SAYS), ["name"]),
    (messages({**ASKS, "name": ""}, SAYS), ["name"]),
    (messages(ASKS, {**SAYS, "mood": "good", "name": "b"}), ["unknown key"]),
    (messages(ASKS), ["last message"]),
    (messages(ASKS, SAYS, ASKS), ["last message"]),
    (messages({"role": "bot"}), ["role", "content", "last message"]),
]  # fmt: skip
MILD = {"blank line", "unknown key", "unused tools"}


def test_every_problem_is_reported_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [line for line, _ in LINES])
    report = data.validate(path)
    found = [(problem.line, problem.kind) for problem in report.train.problems]
    want = [(i, kind) for i, (_, kinds) in enumerate(LINES, 1) for kind in kinds]
    assert found == want
    sound = sum(not set(kinds) - MILD and kinds != ["blank line"] for _, kinds in LINES)
    assert (report.train.lines, report.train.examples) == (len(LINES), sound)
    assert not report.ok
    printed = str(report).splitlines()
    for kind, times in Counter(kind for _, kind in found).items():
        (row,) = (line for line in printed if re.match(rf"{kind}  +\d", line))
        assert row.removeprefix(kind).split()[0] == str(times)
    json.dumps(report.as_dict())


@pytest.mark.parametrize(("line", "kinds"), LINES, ids=lambda x: repr(x)[:40])
def test_what_is_fatal_is_not_read(line: Any, kinds: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [good(7), line, good(8)])
    if set(kinds) - MILD:
        with pytest.raises(pl.FileError, match="line 2: "):
            data.chat(path)
    else:
        assert len(data.chat(path)) == 3 - (kinds == ["blank line"])


@given(st.lists(st.binary(max_size=40) | st.sampled_from([b"{}", b"[", b'{"messages": ', b"\n"])))
def test_any_bytes_are_reported_on(tmp_path_factory: Any, lines: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("any") / "chats.jsonl"
    path.write_bytes(b"".join(lines))
    report = data.validate(path)
    assert report.train.examples == 0 and not report.ok


TURNS = st.tuples(st.sampled_from(["user", "system"]), st.text(st.characters(codec="utf-8")))


@given(st.lists(TURNS, min_size=1, max_size=4))
def test_sound_chats_are_read_as_they_were_written(tmp_path_factory: Any, turns: Any) -> None:
    path = tmp_path_factory.mktemp("sound") / "chats.jsonl"
    turns = [(role, f"{said}.") for role, said in turns]
    row = chat(*turns, ("assistant", "\u2028\r\x1e."))
    write(path, [row, json.dumps(row, ensure_ascii=False).encode()])
    want = data.ByteTokenizer().render(row["messages"])
    assert [list(example["input_ids"]) for example in data.chat(path)] == [want] * 2


FORMS: list[tuple[Any, str, Any]] = [
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, "pairs", ("Add.\n1 2\n", "3")),
    ({"instruction": "Hi", "input": "", "output": "Ho"}, "pairs", ("Hi\n", "Ho")),
    ({"prompt": "a", "completion": "b"}, "pairs", ("a", "b")),
    ({"text": "abc", "label": 3}, "text", "abc"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
      "system": "s"}, "chat", chat(("system", "s"), ("user", "a"), ("assistant", "b"))),
    ({"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
     "chat", chat(("user", "a"), ("assistant", "b"))),
    ({"prompt": [ASKS, SAYS, ASKS], "completion": [SAYS]}, "chat",
     messages(ASKS, {**SAYS, "weight": 0}, ASKS, SAYS)),
    (messages({"role": "developer", "content": [{"type": "text", "text": "a"}, "b"]}, SAYS),
     "chat", messages({"role": "system", "content": "ab"}, SAYS)),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reader", "ours"), FORMS)
def test_rows_of_other_forms_are_read(row: Any, reader: str, ours: Any, tmp_path: Path) -> None:
    path, read = write(tmp_path / "rows.jsonl", [row] * 2), getattr(data, reader)
    assert readers.reader_for(path) == reader
    for source in (path, [row] * 2):
        for found, want in zip(read(source), read([ours] * 2), strict=True):
            assert torch.equal(found["labels"], want["labels"])
            assert torch.equal(found["input_ids"], want["input_ids"])
    report, found = data.validate(path).train, read(path)
    assert (report.examples, report.tokens) == (len(found), sum(found.lengths))
    assert report.learned_tokens == sum(int((e["labels"] >= 0).sum()) for e in found)
    assert [p.kind for p in report.problems] == ["too few", "duplicate"]


RATED = {"prompt": "a", "completion": "b", "label": False}
OTHERS: list[tuple[Any, str]] = [
    ({"prompt": "a", "response": "b"}, "pl.data.pairs reads these"),
    ({"text": "a"}, "pl.data.text reads these"),
    (RATED, "pl.data.pairs([(r['prompt'], r['completion']) for r in rows if r['label']])"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"},
     "pl.data.pairs([(r['prompt'], r['chosen']) for r in rows])"),
    ({"prompt": [ASKS], "chosen": [SAYS], "rejected": [SAYS]},
     "pl.data.chat([{'messages': r['prompt'] + r['chosen']} for r in rows])"),
    ({"chosen": [ASKS, SAYS], "rejected": [ASKS, SAYS]},
     "pl.data.chat([{'messages': r['chosen']} for r in rows])"),
    ({"chosen": "a", "rejected": "b"}, "pl.data.text([r['chosen'] for r in rows])"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "line"), OTHERS)
def test_rows_of_another_kind_are_told_what_reads_them(row: Any, line: str) -> None:
    with pytest.raises(pl.PeftliteError) as error:
        data.chat([row])
    assert line in str(error.value)
    if "for r in rows" in line:
        assert len(eval(line, {"pl": pl, "rows": [row, {**row, "label": True}]}))


def test_a_json_array_is_one_problem(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    for indent in (None, 1):
        path.write_text(json.dumps([good(i) for i in range(12)], indent=indent))
        (problem, _) = sorted(data.validate(path).train.problems, key=lambda p: -(p.line or 0))
        assert problem.message.startswith("the file is one JSON array: jq")
        with pytest.raises(pl.FileError, match="the file is one JSON array"):
            data.chat(path)
    assert len(data.chat(json.loads(path.read_text()))) == 12


def test_what_has_no_examples_is_not_planned(tmp_path: Path) -> None:
    report = data.validate(write(tmp_path / "chats.jsonl", [{}] * 5000))
    assert "training:" not in str(report) and "nothing to train on" in str(report)
    assert len(str(report).splitlines()) < 8 and len(report.train.problems) == 5001


def test_duplicates_and_leaks(tmp_path: Path) -> None:
    train = [good(i) for i in range(12)] + [good(3), {**good(3), "note": "again"}, good(5)]
    held = [good(20), good(5), good(21), good(5)]
    report = data.validate(
        write(tmp_path / "train.jsonl", train), write(tmp_path / "held.jsonl", held)
    )
    found = [(p.line, p.kind, p.message) for p in report.train.problems]
    assert found == [
        (13, "duplicate", "the example is that of line 4"),
        (14, "duplicate", "the example is that of line 4"),
        (15, "duplicate", "the example is that of line 6"),
    ]
    assert report.validation is not None
    leak = "the example is line 6 of the training file, too"
    assert [(p.line, p.message) for p in report.validation.problems] == [
        (2, leak), (4, "the example is that of line 2")
    ]  # fmt: skip
    empty = write(tmp_path / "empty.jsonl", [])
    report = data.validate(empty, empty)
    assert [[p.kind for p in file.problems] for file in report.files] == [["too few"]] * 2


def test_a_sound_file(tmp_path: Path) -> None:
    path, tokenizer = write(tmp_path / "topics.jsonl", rows()), hf_tokenizer(data.CHATML)
    report = data.validate(path, tokenizer=tokenizer)
    examples = data.chat(path, tokenizer)
    assert report.ok and report.train.lines == report.train.examples == len(rows())
    assert report.train.tokens == sum(examples.lengths)
    assert report.train.longest == max(examples.lengths)
    assert report.train.learned_tokens == sum(int((e["labels"] >= 0).sum()) for e in examples)
    assert "no problems" in str(report) and f"tokens of {type(tokenizer).__name__}" in str(report)


def test_truncation_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "topics.jsonl", rows())
    lengths = data.chat(path).lengths
    report = data.validate(path, max_length=400)
    assert report.train.truncated == sum(length > 400 for length in lengths) > 0
    assert {p.kind for p in report.train.problems} == {"too long"}
    cut = data.chat(path, max_length=400)
    assert cut.lengths == [min(length, 400) for length in lengths]
    assert report.train.tokens == sum(cut.lengths)
    assert report.train.longest == max(lengths)
    lost = data.validate(path, max_length=10).train.problems
    assert lost[0].message.endswith("cut off after 10, and no token to learn is left")


def test_a_template_that_refuses(tmp_path: Path) -> None:
    tokenizer = hf_tokenizer("{{ raise_exception('no ' + messages[0]['role']) }}")
    report = data.validate(write(tmp_path / "chats.jsonl", [good()] * 2), tokenizer=tokenizer)
    message = "the chat template refuses these messages: no user"
    assert [(p.line, p.message) for p in report.train.problems[1:]] == [(1, message), (2, message)]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [b"", b"\n"])
def test_line_ends_and_a_mark_at_the_start(newline: bytes, last: bytes, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    lines = [json.dumps(good(i)).encode() for i in range(10)]
    path.write_bytes(b"\xef\xbb\xbf" + newline.join(lines) + last.replace(b"\n", newline))
    assert [p.kind for p in data.validate(path).train.problems] == ["byte order mark"]
    assert [e["labels"][-2] for e in data.chat(path)] == [ord(".")] * 10
    path.write_text("\n".join(map(json.dumps, [good(), good()])), encoding="utf-16")
    assert [(p.line, p.kind) for p in data.validate(path).train.problems] == [
        (None, "too few"), (1, "encoding")
    ]  # fmt: skip


def test_a_line_without_end_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "LONGEST", 200)
    long = json.dumps(good()).encode() + b" " * 1000
    path = write(tmp_path / "chats.jsonl", [good(1), long, good(2), b"{" * 199, b"{" * 200])
    found = [(p.line, p.kind) for p in data.validate(path).train.problems]
    assert found == [(None, "too few"), (2, "JSON"), (4, "JSON"), (5, "JSON")]


def test_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    with open(tmp_path / "large.jsonl", "w") as file:
        for i in range(1000):
            row = chat(("user", f"{i}"), ("assistant", "x" * 20_000))
            file.write(json.dumps(row) + "\n")
    size = (tmp_path / "large.jsonl").stat().st_size
    tracemalloc.start()
    report = data.validate(tmp_path / "large.jsonl")
    every = data.chat(tmp_path / "large.jsonl")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.train.examples == len(every) == 1000
    assert size > 2e7 and peak < 2e6


def test_rows_come_out_of_the_file_as_they_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "topics.jsonl", rows())
    every = data.chat(path)
    assert every.rows[3] == rows()[3] and len(every) == len(rows())
    again = pickle.loads(pickle.dumps(every))
    assert torch.equal(again[5]["labels"], every[5]["labels"])
    train, _ = every.split(0.2, stratify="letter")
    assert train.rows[0] == rows()[0]
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(pl.FileError, match="has changed since it was read"):
        every[6]
    path.unlink()
    with pytest.raises(pl.FileError, match="has changed since it was read"):
        every[6]


@pytest.mark.parametrize("examples", [0, 1, 9, 34, 100, 1000, 30_000, 10**6])
def test_the_estimate(examples: int) -> None:
    found = data.estimate(examples)
    n = max(examples, 1)
    assert found.steps == found.epochs * -(-examples // found.batch_size)
    assert 1 <= found.epochs <= 25 and 1 <= found.batch_size <= 256
    assert found.epochs * n <= 25_000 or found.epochs == 1
    assert found.epochs * n >= 100 or found.epochs == 25


def test_pairs_and_texts_out_of_files(tmp_path: Path) -> None:
    pairs = [{"prompt": "a", "response": "b", "n": 1}, {"prompt": "c", "response": "d", "n": 2}]
    every = data.pairs(write(tmp_path / "pairs.jsonl", pairs), max_length=2)
    assert [e["input_ids"].tolist() for e in every] == [[97, 98], [99, 100]]
    assert every.values("n") == [1, 2]
    again = data.pairs([("a", "b"), ["c", "d"]], max_length=2)
    assert [e["labels"].tolist() for e in again] == [[-100, 98], [-100, 100]]
    texts = data.text(write(tmp_path / "texts.jsonl", [{"text": "abcde"}]), length=4)
    assert [e["input_ids"].tolist() for e in texts] == [[97, 98, 99, 100], [101, 257]]
    assert len(data.text(["abcde", "f"])) == 2


def test_a_length_that_leaves_nothing_to_learn_is_warned_of() -> None:
    examples = data.chat([good()], max_length=24)
    with pytest.warns(UserWarning, match="max_length=8 leaves some examples without a token"):
        lost = data.chat([good()], max_length=8)
    assert (lost[0]["labels"] == -100).all() and (examples[0]["labels"] != -100).any()
