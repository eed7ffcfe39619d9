"""The errors of the demo."""

from typing import Any
from unittest import mock

from peftlite.demo import text
from tests.errors.case import Case


@mock.patch("sysconfig.get_path")
def without_sources(get_path: Any) -> None:
    get_path.return_value = "/nowhere"
    text.code()


CASES = [
    Case(lambda *_: without_sources(), "the demo reads Python's own source, but /nowhere has 0 "
         "modules as text; run it with a Python whose standard library is installed as .py files"),
]  # fmt: skip
