"""Every page for people: its code runs, its links lead somewhere, the files it names are there."""

import io
import pkgutil
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch

import peftlite as pl
from peftlite import cli
from tests import methods_page, performance_page
from tests.train.chats import hf_tokenizer, llama, rows, write

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
PAGES += [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "notebooks/README.md")]
PAGES += [
    ROOT / name for name in ("tests/README.md", "benchmarks/README.md", "benchmarks/NOTES.md")
]
PAGES += sorted((ROOT / "peftlite").rglob("README.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
CODE = re.compile(r"`([^`\n]+)`")
OURS = "https://github.com/peftlite/peftlite/blob/main/"
A_FILE = re.compile(r"[\w./-]+(?:\.(?:py|md|toml|txt|yaml|cff|sh)|/)")
A_NAME = re.compile(
    r"\b(pl|peftlite|Patch|Method|Site|Delta|DeltaBank|Trainer)((?:\.[A-Za-z_]\w*)+)"
)


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=title)


@each_page
def test_the_code_runs(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A `text` right after a `python` is what that prints, but for its numbers."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    text, printed, end = page.read_text(), "", 0
    for block in BLOCK.finditer(text):
        language, code = block.groups()
        known = language in ("python", "sh", "text", "yaml")
        assert known, f"a block of {language!r} would not be run"
        if language == "python":
            exec(compile(code, str(page), "exec", dont_inherit=True), names)
            printed, end = capsys.readouterr().out, block.end()
        elif language == "text" and end and not text[end : block.start()].strip():
            assert _words(code) == _words(printed)


def _words(text: str) -> str:
    return " ".join(re.sub(r"-+|[\d.,]*\d", "#", text).split())


@pytest.mark.heavy
def test_the_command_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the page on them, one after another, on a small model and short chats."""
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("llama")
    hf_tokenizer(pl.data.CHATML).save_pretrained("llama")
    short = [row for row in rows() if len(str(row)) < 600]
    write(Path("train.jsonl"), short[:10])
    write(Path("val.jsonl"), short[10:12])
    Path("questions.txt").write_text("What is a join?\nAnd a view?\n")
    for language, code in BLOCK.findall((ROOT / "docs/cli.md").read_text()):
        if language == "yaml":
            Path("run.yaml").write_text(code)
        for line in code.splitlines() if language == "sh" else ():
            name, *words = shlex.split(line, comments=True)
            monkeypatch.setattr(sys, "stdin", io.StringIO("Hello.\n/off\nHello.\n"))
            assert name == "peftlite" and cli.main(words) == (words[0] == "diff"), line


def test_the_readme_learns_and_restores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, *_ = (
        code for language, code in BLOCK.findall(PAGES[0].read_text()) if language == "python"
    )
    assert len([line for line in first.splitlines() if line.strip()]) <= 16
    names: dict = {}
    exec(first, names)
    loss = torch.nn.functional.cross_entropy(names["model"](names["x"]), names["y"])
    pl.use(names["model"], None)
    base = torch.nn.functional.cross_entropy(names["model"](names["x"]), names["y"])
    assert loss < 0.9 * base


@pytest.mark.heavy
@pytest.mark.skipif(
    not version("transformers").startswith("4."),
    reason="the page is made with the versions of constraints.txt, which serve other models",
)
def test_the_page_of_methods_is_what_they_say() -> None:
    stale = "docs/methods.md is stale: python -m tests.made"
    assert methods_page.PAGE.read_text() == methods_page.render(), stale


def test_the_table_of_methods_is_the_cards() -> None:
    stale = "README's table is stale: python -m tests.made"
    assert methods_page.README.read_text() == methods_page.render_readme(), stale


def test_the_figures_are_the_benchmarks() -> None:
    stale = "docs/performance.md is stale: python -m tests.made"
    assert performance_page.PAGE.read_text() == performance_page.render(), stale
    stale = "docs/which_method.md is stale: python -m tests.made"
    assert performance_page.WHICH.read_text() == performance_page.render_which(), stale


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)[)#]", page.read_text()):
        assert page != PAGES[0], f"{target} is nowhere on PyPI: give its address, {OURS}…"
        assert (page.parent / target).exists(), target
        assert page not in DOCS or ROOT / "docs" in (page.parent / target).resolve().parents, (
            f"{target} isn't on the site: give its address, {OURS}…"
        )
    for target in re.findall(re.escape(OURS) + r"([^)#]*)", page.read_text()):
        assert (ROOT / target).exists(), target


@each_page
def test_the_files_it_names_are_there(page: Path) -> None:
    spans = CODE.findall(page.read_text())  # peftlite's commands are given files of the reader's
    words = [word for code in spans if not code.startswith("peftlite ") for word in code.split()]
    named = filter(A_FILE.fullmatch, words)
    lost = [name for name in named if not any(_places(page, name))]
    run = [word for flag, word in pairwise(words) if flag == "-m" and word.startswith("tests.")]
    lost += [name for name in run if find_spec(name) is None]
    assert not lost, f"{title(page)} names {lost}"


@each_page
def test_the_names_it_uses_are_there(page: Path) -> None:
    for root, rest in A_NAME.findall(" ".join(CODE.findall(page.read_text()))):
        pkgutil.resolve_name("peftlite" + (rest if root.islower() else f".{root}{rest}"))


def _places(page: Path, name: str) -> Iterator[bool]:
    """Whether a file or folder is in each of the places where its name may be meant to be."""
    yield from ((folder / name).exists() for folder in (page.parent, ROOT, ROOT / "peftlite"))
    yield "/" not in name and any((ROOT / "peftlite").rglob(name))  # of a folder named before


def test_every_page_is_on_the_site() -> None:
    named = re.findall(r"[\w/]+\.md\b", (ROOT / "mkdocs.yml").read_text())
    assert sorted(named) == sorted(str(page.relative_to(ROOT / "docs")) for page in DOCS)


def _kinds(module: ModuleType) -> list[str]:
    """The classes that a module makes, but for those of its own use."""
    own = {n: v for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
    return [n for n, v in own.items() if isinstance(v, type) and not n.startswith("_")]


def test_every_public_name_is_on_a_page_of_the_api() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = re.findall(r"^::: peftlite\.(.+)$", pages, re.M)
    modules = {n: v for n in pl.__all__ if isinstance(v := getattr(pl, n), ModuleType)}
    named = [name for name in pl.__all__ if name not in modules]
    for name, module in modules.items():
        inside = [n for n in module.__all__ if callable(getattr(module, n)) and n not in named]
        named += [f"{name}.{n}" for n in inside]
        within = [n for n in module.__all__ if isinstance(getattr(module, n), ModuleType)]
        named += [f"{name}.{n}.{kind}" for n in within for kind in _kinds(getattr(module, n))]
    assert sorted(shown) == sorted(named)


# -- what is said of the project in several places


def test_the_linters_have_one_version() -> None:
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    pins = re.findall(r'"([\w-]+==[\w.]+)"', (ROOT / ".pre-commit-config.yaml").read_text())
    assert pins and set(pins) <= set(constraints)


@pytest.mark.parametrize("name", ["pyproject.toml", "CITATION.cff", "SECURITY.md"])
def test_the_project_has_one_address(name: str) -> None:
    text = (ROOT / name).read_text()
    assert set(re.findall(r"https://github\.com/[\w-]+/[\w-]+", text)) == {
        "https://github.com/peftlite/peftlite"
    }
