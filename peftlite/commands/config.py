"""Config: a command's options in a YAML file, read as if they were typed, and written."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from peftlite.errors import FileError, PeftliteError, reason
from peftlite.spelling import ADVICE, nearest
from peftlite.table import listed

Options = Mapping[str, Mapping[str, Any]]
"""A command's options by their names in Python, each with how argparse takes it."""

OWN = ("config", "print_config")  # which no config has


def typed(path: str, options: Options) -> list[str]:
    """What a file says as it is typed: `rank: 8` is `--rank=8`. Raises FileError."""
    options = _options(options)
    words: list[str] = []
    seen: dict[str, int] = {}
    for key, value in _entries(path):
        line = key.start_mark.line + 1
        name = str(key.value).replace("-", "_")
        if name not in options:
            raise FileError(
                f"{path!r}, line {line}: there is no option {key.value!r}{_instead(name, options)}"
            )
        if name in seen:
            raise FileError(f"{path!r}, line {line}: {name} is on line {seen[name]} already")
        seen[name] = line
        try:
            words += _words(name, value, options[name])
        except ValueError as error:
            raise FileError(f"{path!r}, line {line}: {name} takes {error}") from error
    return words


def written(args: Namespace, options: Options) -> str:
    """The options that aren't as by default, in YAML."""
    options = _options(options)
    given = {name: getattr(args, name) for name in options}
    given = {n: value for n, value in given.items() if value != options[n].get("default")}
    if given.get("set"):
        given["set"] = dict(map(key_and_value, given["set"]))
    entries = ({name: value} for name, value in given.items())
    dumped = (_yaml().safe_dump(entry, allow_unicode=True, width=4096) for entry in entries)
    return "".join(dumped).rstrip("\n")


def key_and_value(text: str) -> tuple[str, Any]:
    """A name and a value, from `KEY=VALUE`: JSON, or else a word. Raises PeftliteError."""
    name, given, value = text.partition("=")
    if not given:
        raise PeftliteError(f"{text!r} is no KEY=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _options(options: Options) -> Options:
    """Those that a config may have."""
    return {name: how for name, how in options.items() if name not in OWN}


def _instead(name: str, options: Options) -> str:
    """What to write in place of an option that there isn't, as the end of a message."""
    if name in ADVICE:
        return f"; for it, {ADVICE[name]}"
    near = nearest(name, options)
    return f"; there is {near}" if near else f": there are {listed(options, 99)}"


def _entries(path: str) -> Sequence[tuple[Any, Any]]:
    """The keys and values of a file, as nodes that know their lines. Raises FileError."""
    yaml = _yaml()
    try:
        with open(path, encoding="utf-8") as file:
            node = yaml.compose(file, yaml.SafeLoader)
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path!r} can't be read as text: {reason(error)}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        why = getattr(error, "problem", None) or reason(error)
        raise FileError(f"{path!r}{where}: no YAML: {why}") from error
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise FileError(f"{path!r} isn't of options, such as `rank: 8`, a line each")
    return [] if node is None else node.value


def _words(name: str, node: Any, how: Mapping[str, Any]) -> list[str]:
    """An option as it is typed. Raises ValueError, with what it takes."""
    option = "--" + name.replace("_", "-")
    value = _value(node)
    if value is None or value == []:
        return []
    if "metavar" not in how:
        if not isinstance(value, bool):
            raise ValueError(f"true or false, not {value!r}")
        return [option if value else f"--no-{option[2:]}"]
    if "nargs" not in how:
        return [f"{option}={_word(node, how)}"]
    if how["metavar"] == "KEY=VALUE" and isinstance(value, dict):
        return [option, *(f"{key.value}={_json(each)}" for key, each in node.value)]
    return [
        option,
        *(_word(each, how) for each in (node.value if isinstance(value, list) else [node])),
    ]


def _word(node: Any, how: Mapping[str, Any]) -> str:
    """A value as it is typed: a number as YAML reads it, anything else to the letter."""
    kind, value = how.get("type"), _value(node)
    if isinstance(value, list | dict):
        raise ValueError(f"one value, not {value!r}")
    word = node.value if kind is None else str(value)
    choices = how.get("choices") or [word]
    if word not in choices:
        raise ValueError(f"one of {', '.join(choices)}, not {word!r}")
    if kind is not None:
        try:
            kind(word)
        except ValueError as error:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"{what}, not {word!r}") from error
    return word


def _json(node: Any) -> str:
    """A value of a method's option: a plain word as it is, anything else as JSON."""
    value = _value(node)
    return node.value if isinstance(value, str) and node.style is None else json.dumps(value)


def _value(node: Any) -> Any:
    return _yaml().constructor.SafeConstructor().construct_document(node)


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise PeftliteError("a config needs pyyaml: pip install pyyaml") from error
    return yaml
