"""The notebooks as they are stored: run in order, without an error, and of public names alone.

That they run is another matter: `python notebooks/run.py`.
"""

import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
A_MACHINE = re.compile(r"/(?:home|root|tmp|usr|work)/|site-packages|\b0x[0-9a-f]{8,}")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _cells(path: Path, kind: str = "code") -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@each_notebook
def test_it_is_stored_as_it_ran(path: Path) -> None:
    cells = _cells(path)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


@each_notebook
def test_it_is_small_and_tells_nothing_of_where_it_ran(path: Path) -> None:
    text = path.read_text()
    assert len(text) <= 300_000
    assert not A_MACHINE.findall(re.sub(r'"image/png": ".*?"', "", text))
    stored = json.loads(text)
    assert stored["metadata"].keys() == {"kernelspec", "language_info"}
    assert stored["metadata"]["language_info"] == {"name": "python"}
    assert not any(cell["metadata"] for cell in stored["cells"])


@each_notebook
def test_it_uses_public_names(path: Path) -> None:
    code = "\n".join("".join(cell["source"]) for cell in _cells(path))
    imports = re.findall(r"^ *(?:from|import) +peftlite\b.*", code, re.M)
    assert set(imports) == {"import peftlite as pl"}
    named = code + " ".join("".join(cell["source"]) for cell in _cells(path, "markdown"))
    for name in re.findall(r"\bpl((?:\.[A-Za-z]\w*)+)", named):
        pkgutil.resolve_name("peftlite" + name)


@each_notebook
def test_it_is_in_the_index(path: Path) -> None:
    assert f"({path.name})" in (FOLDER / "README.md").read_text()


def test_its_packages_are_pinned_by_hash() -> None:
    lines = (FOLDER / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    pin = re.compile(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}")
    assert pins and all(pin.fullmatch(line) for line in pins)
