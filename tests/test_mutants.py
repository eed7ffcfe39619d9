"""Mutants: a small fault is made where it should be, and the rest of a source stays as it is."""

import ast

import mutants
import pytest

SOURCE = '''"""Größe."""
def take(x: int = 1) -> "x < 2":
    s.size = x + 1
    if not x or x < 2 and y is None:
        raise ValueError(f"{x + 1}")
    print("π")
    return x == 0
'''


@pytest.mark.parametrize(
    "line, before, after",
    [
        (2, "1", "2"),
        (3, "s.size = x + 1", "pass"),
        (3, "x + 1", "(x - 1)"),
        (3, "1", "2"),
        (4, "not x or x < 2 and y is None", "(not x and (x < 2 and y is None))"),
        (4, "not x", "(x)"),
        (4, "x < 2 and y is None", "(x < 2 or y is None)"),
        (4, "x < 2", "(x <= 2)"),
        (4, "2", "3"),
        (4, "y is None", "(y is not None)"),
        (5, 'raise ValueError(f"{x + 1}")', "pass"),
        (6, 'print("π")', "pass"),
        (7, "x == 0", "(x != 0)"),
        (7, "0", "1"),
    ],
)
def test_a_fault_is_made(line: int, before: str, after: str) -> None:
    (mutant,) = (m for m in mutants.mutants(SOURCE) if (m.line, m.before) == (line, before))
    assert mutant.after == after
    made = mutant.applied(SOURCE)
    assert ast.unparse(ast.parse(made)) != ast.unparse(ast.parse(SOURCE))
    lines, others = made.splitlines(), SOURCE.splitlines()
    assert lines[line - 1] == others[line - 1].replace(before, after, 1)
    assert lines[: line - 1] + lines[line:] == others[: line - 1] + others[line:]


def test_no_other_faults_are_made() -> None:
    assert len(list(mutants.mutants(SOURCE))) == 14


def test_a_context_is_a_test() -> None:
    assert mutants._node("tests.bank.test_rows.test_it") == "tests/bank/test_rows.py::test_it"
