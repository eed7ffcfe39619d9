"""Tokenizers: bytes, transformers', any function from text to ids; and the assistant's tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, ClassVar

from peftlite.errors import PeftliteError
from peftlite.table import short
from peftlite.train.data.checks import ROLES

Message = Mapping[str, Any]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}"
    "{% if m['name'] %}{{ ' name=' + m['name'] }}{% endif %}{{ '\\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% for call in m['tool_calls'] or [] %}"
    "{% if m['content'] or not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<tool_call>\\n' + (call['function'] or call) | tojson + '\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML as a template, for a tokenizer that has none: `tokenizer.chat_template = CHATML`."""

# with the space that jinja takes away around a block: before it on its line, and one line's end
MARKER = re.compile(r"(?m:^[ \t]+)?{%(-?)\+?\s*(end)?generation\s*\+?(-?)%}\n?")
BEGIN, END = "\ufdd0", "\ufdd1"  # what no text has: Unicode sets them apart for use inside programs


class Tokenizer:
    """What data asks of a tokenizer. Your own overrides `encode` and, for chats, `render`."""

    takes_tools: bool = False  # whether `render` takes the `tools` that the assistant can call
    pad: int = 0  # the id that fills up a batch
    start: Sequence[int] = ()  # the ids before a text
    end: Sequence[int] = ()  # the ids after a text

    def encode(self, text: str) -> list[int]:
        """The ids of a text, and no others."""
        raise NotImplementedError

    def render(self, messages: Sequence[Message], prompt: bool = False) -> list[int]:
        """The ids of a chat; with `prompt`, and of what opens the assistant's next message."""
        return self.encode(chatml(messages, prompt))

    def render_with_mask(
        self, messages: Sequence[Message], **options: Any
    ) -> tuple[list[int], list[int]]:
        """The ids of a chat, and 1 for each that the assistant is to say, else 0.

        The tokens of an assistant's message are those that it adds to the chat before it; what has
        `"weight": 0` is not to be said. Raises PeftliteError if a longer chat doesn't start with
        the ids of its own beginning.

        Args:
            options: of `render`.
        """
        ids = self.render(messages, **options)
        mask = [0] * len(ids)
        for k, message in enumerate(messages):
            if _is_learned(message):
                before = self.render(messages[:k], prompt=True, **options)
                after = self.render(messages[: k + 1], **options)
                if after[: len(before)] != before or ids[: len(after)] != after:
                    raise PeftliteError(
                        "the chat template writes the beginning of a chat otherwise when it goes "
                        f"on, so which ids of message {k + 1} are the assistant's can't be told: "
                        "put {% generation %} … {% endgeneration %} around them in "
                        "tokenizer.chat_template, or give assistant_only=False"
                    )
                mask[len(before) : len(after)] = [1] * (len(after) - len(before))
        return ids, mask


def chatml(messages: Sequence[Message], prompt: bool = False) -> str:
    """A chat as text, in ChatML."""
    turns = [f"<|im_start|>{_who(m)}\n{_said(m)}<|im_end|>\n" for m in messages]
    return "".join([*turns, "<|im_start|>assistant\n" * prompt])


def _who(message: Message) -> str:
    return f"{message['role']} name={message['name']}" if "name" in message else message["role"]


def _said(message: Message) -> str:
    """What a message says, and what it calls as Hermes and Qwen write that."""
    calls = (call.get("function", call) for call in message.get("tool_calls", ()))
    written = (json.dumps(call, ensure_ascii=False) for call in calls)
    parts = [message["content"], *(f"<tool_call>\n{call}\n</tool_call>" for call in written)]
    return "\n".join(part for part in parts if part)


def _is_learned(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("weight", 1) != 0


class ByteTokenizer(Tokenizer):
    """A byte is an id; roles and ends have ids above, which no text can spell."""

    specials: ClassVar[tuple[str, ...]] = (
        "<pad>",
        "<end>",
        "<name>",
        *(f"<{role}>" for role in ROLES),
    )
    vocab_size = 264  # of which the last one is free: a multiple of 8
    pad = pad_token_id = 256
    end: Sequence[int] = (257,)
    eos_token_id = 257

    def encode(self, text: str | bytes) -> list[int]:
        """The bytes of a text, in UTF-8; any bytes, as they are."""
        return list(text.encode(errors="surrogatepass") if isinstance(text, str) else text)

    def to_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes among the ids: `to_bytes(encode(x)) == x`, whatever the bytes."""
        return bytes(i for i in map(int, ids) if i < 256)

    def decode(self, ids: Sequence[int]) -> str:
        """The text among the ids; what is no UTF-8 shows as �."""
        return self.to_bytes(ids).decode(errors="replace")

    def render(self, messages: Sequence[Message], prompt: bool = False) -> list[int]:
        """`<role> content <end>`, or `<role> name <name> content <end>`, for each message."""
        opening = [self._id("<assistant>")] if prompt else []
        return [*chain.from_iterable(map(self._render_one, messages)), *opening]

    def render_with_mask(
        self, messages: Sequence[Message], **options: Any
    ) -> tuple[list[int], list[int]]:
        """The ids of a chat, and 1 for each of an assistant's content and end, else 0."""
        ids, mask = [], []
        for message in messages:
            ids += self._render_one(message)
            mask += [0] + [int(_is_learned(message))] * (len(ids) - len(mask) - 1)
        return ids, mask

    def _render_one(self, message: Message) -> Iterator[int]:
        name = [*self.encode(message["name"]), self._id("<name>")] if "name" in message else []
        return chain(
            [self._id(f"<{message['role']}>"), *name], self.encode(_said(message)), self.end
        )

    def _id(self, special: str) -> int:
        return 256 + self.specials.index(special)


class _Function(Tokenizer):
    """A function from text to ids, or something that has one called `encode`."""

    def __init__(self, given: Any) -> None:
        self.given = given
        self._call: Callable[[str], Any] = getattr(given, "encode", given)
        if hasattr(given, "post_processor"):  # of tokenizers, which puts tokens around a text
            self._call = partial(given.encode, add_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        return _ids(self._call(text))


class _Transformers(Tokenizer):
    """A tokenizer of transformers, and its chat template."""

    def __init__(self, given: Any) -> None:
        self.given = given
        end, pad, bos = (getattr(given, f"{name}_token_id", None) for name in ("eos", "pad", "bos"))
        opens = _ids(given(""))[:1]  # whether it opens texts with its first token, or only has one
        self.start = opens if opens == [bos] else []
        self.end = [] if end is None else [end]
        self.pad = next((i for i in (pad, end) if i is not None), 0)
        self.takes_tools = "tools" in str(getattr(given, "chat_template", None))

    def encode(self, text: str) -> list[int]:
        return _ids(self.given.encode(text, add_special_tokens=False))

    def render(
        self, messages: Sequence[Message], prompt: bool = False, **options: Any
    ) -> list[int]:
        return _ids(self._apply(messages, add_generation_prompt=prompt, **options))

    def render_with_mask(
        self, messages: Sequence[Message], **options: Any
    ) -> tuple[list[int], list[int]]:
        """By the template's own markers where it has them, which take a fast tokenizer's offsets.

        transformers' own mask is not used: after a marked text that ends in space which the
        tokenizer drops, it takes all that follows for the assistant's.
        """
        template = self._template(**options)
        marked = MARKER.sub(_shown_marker, template)
        if marked == template or not self.given.is_fast:
            return super().render_with_mask(messages, **options)
        written = self._apply(messages, tokenize=False, chat_template=marked, **options)
        said = [_is_learned(m) for m in messages if m["role"] == "assistant"]
        if written.count(BEGIN) != len(said):
            if not all(said):  # so which of them a marked text is of can't be told
                return super().render_with_mask(messages, **options)
            said = [True] * written.count(BEGIN)
        text, learned, inside, following = [], [], False, iter(said)
        for letter in written:
            if letter in (BEGIN, END):
                inside = letter == BEGIN and next(following)
            else:
                text.append(letter)
                learned.append(inside)
        found = self.given("".join(text), add_special_tokens=False, return_offsets_mapping=True)
        return _ids(found), [int(any(learned[a:b])) for a, b in found["offset_mapping"]]

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        self._template()
        plain = [{k: v for k, v in message.items() if k != "weight"} for message in messages]
        try:
            return self.given.apply_chat_template(plain, **options)
        except Exception as error:  # whatever a template raises
            raise PeftliteError(f"the chat template refuses these messages: {error}") from error

    def _template(self, **options: Any) -> str:
        template = self.given.chat_template
        if isinstance(template, dict):  # of those by name, transformers takes one for tools
            with_tools = "tool_use" if options.get("tools") else "default"
            template = template.get(with_tools, template.get("default"))
        if template is None:
            raise PeftliteError(
                "this tokenizer has no chat template: set tokenizer.chat_template, for one to "
                "pl.data.CHATML"
            )
        return template


def _shown_marker(marker: re.Match[str]) -> str:
    """A template's generation marker as an expression that writes it into the text."""
    left, ends, right = marker.groups()
    return f"{{{{{left} '{END if ends else BEGIN}' {right}}}}}"


def as_tokenizer(given: Any = None) -> Tokenizer:
    """Any tokenizer as data needs it: None is `ByteTokenizer()`.

    Takes a tokenizer of transformers, with its chat template; anything else with `encode`; or a
    function from a text to ids, whose chats are written in ChatML.

    Raises:
        PeftliteError: it is none of these.

    Example:
        words = ["one", "two", "three"]
        tokenizer = pl.data.as_tokenizer(lambda text: [words.index(w) for w in text.split()])
        assert tokenizer.encode("two one") == [1, 0]
    """
    if given is None:
        return ByteTokenizer()
    if isinstance(given, Tokenizer):
        return given
    if hasattr(given, "apply_chat_template"):
        return _Transformers(given)
    if callable(given) or hasattr(given, "encode"):
        return _Function(given)
    raise PeftliteError(
        "a tokenizer is one of transformers', a function from a text to ids, or None for bytes: "
        f"not {short(given)}"
    )


def _ids(found: Any) -> list[int]:
    """Ids out of what tokenizers return: lists, tensors, or these in a dict or an object."""
    if isinstance(found, Mapping):
        found = found["input_ids"]
    found = getattr(found, "ids", found)
    return [int(i) for i in found]
