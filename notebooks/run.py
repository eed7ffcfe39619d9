"""Runs the notebooks from clean: `python notebooks/run.py`; `--write` stores what comes of it.

Each runs in a kernel of its own, on one core, in an empty folder, two at a time. An error fails it,
and so does LIMIT. Stored are outputs, and nothing that tells where and when they were made.
"""

import argparse
import base64
import io
import os
import resource
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  # finds its fonts once, before kernels would both do so
import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent
LIMIT = 180  # seconds of a processor, whose caches others use, too; alone it is to be below 120
CLEAN = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # by a bar that isn't shown
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="such as 1; all of them if left out")
    parser.add_argument("--write", action="store_true", help="store the outputs")
    args = parser.parse_args()
    paths = [p for p in sorted(HERE.glob("*.ipynb")) if _asked(p.name, args.names)]
    with ProcessPoolExecutor(2) as pool:
        runs = {pool.submit(run, path): path for path in paths}
        for done in as_completed(runs):
            path, (notebook, seconds) = runs[done], done.result()
            print(f"{path.name}: {seconds:.0f} s", flush=True)
            if args.write:
                nbformat.write(notebook, path)
            if seconds > LIMIT:
                raise SystemExit(f"{path.name} took more than {LIMIT} s of a processor")


def _asked(name: str, names: list[str]) -> bool:
    return not names or name.startswith(tuple(names))


def run(path: Path) -> tuple[nbformat.NotebookNode, float]:
    """The notebook with its outputs, and the seconds of a processor that they took."""
    notebook = nbformat.read(path, as_version=4)
    for i, cell in enumerate(notebook.cells):
        cell.update(id=f"cell-{i}", metadata={})
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    path_too = f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=["--Application.log_level=40"],
        )
        before = _seconds()
        client.execute(env=os.environ | SETTINGS | {"PYTHONPATH": path_too})
    notebook.metadata = nbformat.from_dict(CLEAN)
    for data in (output.get("data", {}) for output in _outputs(notebook)):
        if "image/png" in data:
            data["image/png"] = _small(data["image/png"])
    return notebook, _seconds() - before


def _outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def _small(png: str) -> str:
    """The picture in 48 colours, which few pictures need more of."""
    small = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(48).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def _seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
