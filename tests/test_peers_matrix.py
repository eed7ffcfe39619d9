"""The matrix of peft's types, settings and models: a sample of it, and what its page says."""

import warnings

import peers
import pytest
from matrix.cases import CONFIGS, UNVARIED, Case, cases, fields, values
from matrix.models import MODELS
from matrix.trial import attempt

import peftlite as pl
from peftlite.io.peft.folder import KNOWN

SAMPLE = peers.sample(150, 11)


@pytest.mark.parametrize("case", SAMPLE, ids=[f"{i}-{c.type}" for i, c in enumerate(SAMPLE)])
def test_a_case_is_equal_or_refused(case: Case) -> None:
    peers.quiet()
    outcome = attempt(case)
    assert not outcome.wrong, f"{case}: {outcome.words}, {outcome.why}"


def test_a_case_that_goes_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("LORA", MODELS["MLP"], {"target_modules": ["lin0"], "r": 2})
    with monkeypatch.context() as patched:
        patched.setattr("matrix.trial._apart", lambda a, b: 1.0)
        assert {*attempt(case).words.values()} == {"unequal"}
    with monkeypatch.context() as patched:
        patched.setattr(pl, "load", lambda *_: warnings.warn("odd", stacklevel=2))
        assert attempt(case).words == {"read": "unequal"}
    with monkeypatch.context() as patched:
        patched.setattr(pl, "load", lambda *_: 1 / 0)
        assert attempt(case).words == {"read": "crashed"}


@pytest.mark.parametrize("kind", sorted(KNOWN))
def test_every_setting_is_varied(kind: str) -> None:
    for field in fields(kind):
        varied = any(values(field, kind, model) for model in MODELS.values())
        assert varied is not (field.name in UNVARIED), field.name


def test_every_type_has_its_row() -> None:
    lines = peers.stored()
    assert {line[0] for line in lines} == {*CONFIGS}
    assert not [line for line in lines if line[2] not in ("equal", "refused", "void")]
    assert peers.render(lines) in peers.PAGE.read_text()


def test_cases_are_many() -> None:
    assert len(cases()) >= 1500
