"""The tables of docs/performance.md and docs/which_method.md, made of benchmarks/results.

`python -m tests.made` writes them.
"""

import csv
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, WHICH = ROOT / "docs" / "performance.md", ROOT / "docs" / "which_method.md"
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.S)
PACKAGES = ("torch", "peft", "safetensors", "bitsandbytes", "torchao")
Record = dict[str, str]


@dataclass(frozen=True)
class Table:
    """A line for every row, and in it a figure for every column, {} standing for what it is of."""

    file: str
    columns: Sequence[str]
    rows: dict[str, str]  # the figure, by what the page calls it

    def render(self) -> str:
        found: dict[str, Record] = {}
        if not (RESULTS / f"{self.file}.csv").exists():
            return f"Not taken yet: `python benchmarks/{self.file}.py` does.\n"
        for line in records(self.file):  # the first of a figure: others are it in another unit
            found.setdefault(line["figure"], line)
        rows = [
            [label, *(cell(found.get(figure.format(column))) for column in self.columns)]
            for label, figure in self.rows.items()
        ]
        return grid(["", *self.columns], rows) + machine(next(iter(found.values())))


TABLES = {
    "attach": Table(
        "attach", ("peftlite", "peft"), {"attach LoRA to a model of Llama 8B's shape": "{}"}
    ),
    "imports": Table(
        "import_time",
        ("peftlite", "peftlite and its first use", "peft"),
        {"import, beyond torch's": "{} beyond torch"},
    ),
    "calls": Table(
        "overhead",
        ("base", "peftlite", "peft"),
        {
            "a call without gradients": "no grad, {}",
            "a call with gradients": "grad, {}",
            "forward and backward": "forward and backward, {}",
        },
    ),
    "linear": Table(
        "lora_linear",
        ("peftlite", "peft", "torchtune's way", "Unsloth's way"),
        {
            f"{o} → {i}, {short}": f"{long} {o}->{i} t1024 r16 p0, {{}}"
            for long, short in (("float32", "fp32"), ("bfloat16", "bf16"))
            for o, i in ((1024, 1024), (2048, 2048), (4096, 4096))
        },
    ),
    "block": Table(
        "block",
        (
            *("full", "peft", "peftlite", "peftlite fused"),
            *("base compiled", "peft compiled", "peftlite compiled"),
        ),
        {
            f"{short}{how}": f"{long} Llama{how}, {{}}"
            for long, short in (("float32", "fp32"), ("bfloat16", "bf16"))
            for how in ("", ", checkpointed", ", dropout", ", dropout, checkpointed")
        },
    ),
    "experts": Table(
        "experts",
        ("peftlite", "peft", "a bank of 4"),
        {
            f"{way}, {shape}, {short}": f"{way} {shape} {long}, {{}}"
            for way in ("loop", "grouped", "batched")
            for shape in ("8 x 1024 x 1024", "64 x 1024 x 256")
            for long, short in (("float32", "fp32"), ("bfloat16", "bf16"))
        },
    ),
    "bank": Table(
        "bank",
        ("bank", "peft", "merged, one delta"),
        {
            "32 rows of 32 tokens, 16 deltas": "32 rows of 32, 16 deltas: {}",
            "32 rows of 1 token, 16 deltas": "32 rows of 1, 16 deltas: {}",
        },
    ),
    "quantized": Table(
        "quantized",
        ("nf4", "nf4, plain", "int8", "bitsandbytes", "torchao"),
        {
            "pack": "1 thread, quantise, {}",
            "unpack": "1 thread, dequantise, {}",
            **{
                f"{step} tokens{lora}, over bf16's": f"1 thread, {step}{lora}, {{}}"
                for step in ("step of 16", "step of 64", "step of 512", "step of 1024")
                for lora in ("", " with LoRA")
            },
            "one token, over bf16's": "1 thread, one token, {}",
            "bytes a weight": "bytes a weight, {}",
            "memory of training, over bf16's": "memory, {} and LoRA over bf16's",
        },
    ),
    "trainer": Table(
        "trainer_overhead", ("by hand", "Trainer", "Trainer, on disk"), {"a step": "{}"}
    ),
    "preference": Table(
        "preference",
        ("DPO", "KTO", "GRPO", "PPO", "DPO, all weights", "GRPO, all weights"),
        {
            "reward gained": "{}, reward gained",
            "KL of an answer to the base": "{}, KL of an answer to the base",
            "pairs held out told apart": "{}, pairs held out told apart",
            "forgotten of a digit": "{}, forgotten of a digit",
        },
    ),
    "roles": Table(
        "preference",
        ("share",),
        {
            "two roles, of twice the rows": "policy and reference over twice the rows",
            "peak memory, of three copies": "peak memory, one base over three copies",
            "head in tiles, time of all logits": "head in tiles, time over all logits",
            "head in tiles, peak of all logits": "head in tiles, peak over all logits",
        },
    ),
    "memory": Table(
        "full_memory",
        ("fp32", "bf16"),
        {
            "the base alone, forward": "{}, base, forward alone",
            "LoRA r8": "{}, LoRA r8",
            "all weights, plain torch": "{}, all weights, plain torch",
            "`pl.FullTuning`": "{}, pl.FullTuning",
        },
    ),
}

TASKS = {"T1": "T1, recall", "T4": "T4, bits a byte", "Reviews": "reviews, accuracy"}
SEEDS = 5
BASES = ("plain", "int8", "nf4", "nf4, searched scales", "nf4, rank 16")


def render() -> str:
    """The page, its tables as the results have them."""
    tables = {name: table.render() for name, table in TABLES.items()}
    return _filled(PAGE, tables | {"packed": _packed(), "missed": _missed()})


def render_which() -> str:
    """The page on which method to take, its table as the results have it."""
    return _filled(WHICH, {"quality": _quality(), "elsewhere": _elsewhere()})


def _filled(page: Path, tables: Mapping[str, str]) -> str:
    return PLACE.sub(lambda m: f"{m[1]}\n{tables[m[2]]}\n{m[3]}", page.read_text())


def records(file: str) -> list[Record]:
    with open(RESULTS / f"{file}.csv") as lines:
        return list(csv.DictReader(lines))


def cell(line: Record | None) -> str:
    """The median, with its unit."""
    if line is None:
        return "–"
    value, unit = float(line["median"]), line["unit"].replace("us", "µs")
    if unit == "x":
        return f"{value:.2f}"
    text = f"{value * 1000:.3g} ms" if unit == "s" and value < 1 else f"{value:.3g} {unit}"
    return text.rstrip()


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("--:" for _ in head[1:])], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine(line: Record) -> str:
    """Where and when it was taken."""
    versions = ", ".join(f"{name} {line[name]}" for name in PACKAGES if line.get(name))
    threads = {"1": "one thread", "2": "two threads"}[line["threads"]]
    return f"\n{line['cpu']}, {threads}, no GPU; {versions}; {line['date']}\n"


def _quality() -> str:
    """What of the gap between the frozen base and full fine-tuning each method closes."""
    lines = {(line["task"], line["method"]): line for line in records("quality")}
    tasks = [task for task in dict.fromkeys(task for task, _ in lines) if task.startswith("T")]
    methods = list(dict.fromkeys(method for _, method in lines if method != "frozen base"))
    rows = [
        [method, *(_closed(lines.get((task, method), {})) for task in tasks),
         _beside([(task, lines.get((task, method), {})) for task in tasks if method != "LoRA r8"]),
         _forgotten([lines.get((task, method), {}) for task in tasks])]
        for method in methods
    ]  # fmt: skip
    return grid(["", *tasks, "beside LoRA r8", "forgets"], rows)


def _elsewhere() -> str:
    """Tasks that not every method ran on: quality, ± a standard deviation."""
    lines = {(line["task"], line["method"]): line for line in records("quality")}
    tasks = [task for task in dict.fromkeys(task for task, _ in lines) if not task.startswith("T")]
    methods = list(dict.fromkeys(method for task, method in lines if task in tasks))
    rows = [
        [method, *(_reached(lines.get((task, method), {})) for task in tasks)] for method in methods
    ]
    return grid(["", *tasks], rows)


def _reached(line: Record) -> str:
    if not line.get("quality"):
        return "–"
    spread = float(line["quality_sd"] or "nan")
    return f"{float(line['quality']):.3g}" + f" ± {spread:.2g}" * (spread > 0)


def _closed(line: Record) -> str:
    if not line.get("gap_closed"):
        return "–"
    mean, low = float(line["gap_closed"]), float(line["gap_low"])
    least = "≥ " * (line["rate_at_edge"] == "high")
    return f"{least}{100 * mean:.0f} ± {100 * (mean - low):.0f}".replace("-", "−")


def _beside(lines: Sequence[tuple[str, Record]]) -> str:
    """The verdicts, each with the tasks that it holds on; of what is open nothing is said."""
    words: dict[str, list[str]] = {}
    for task, line in lines:
        if (word := line.get("beside_lora", "")) not in ("", "open"):
            words.setdefault(word, []).append(task.split()[0])
    return "; ".join(f"{word}: {', '.join(found)}" for word, found in words.items())


def _forgotten(lines: Sequence[Record]) -> str:
    found = (line.get("forgetting") for line in lines)
    return ", ".join(f"{float(x):+.2f}".replace("-", "−") if x else "–" for x in found)


def _packed() -> str:
    """What LoRA reaches on packed bases: means of the seeds that ran, ± a standard deviation."""
    found: dict[tuple[str, str], list[float]] = {}
    for line in records("quant_quality"):
        found.setdefault((line["base"], line["task"]), []).append(float(line["quality"]))
    rows = [[base, *(_spread(found.get((base, task), [])) for task in TASKS)] for base in BASES]
    return grid(["", *TASKS.values()], rows)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    few = f" ({len(values)} of {SEEDS} seeds)" if len(values) < SEEDS else ""
    return f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}{few}"


def _missed() -> str:
    """Whatever has a bound and is beyond it."""
    files = sorted(path.stem for path in RESULTS.glob("*.csv"))
    lines = [
        (line["figure"].replace("->", " → ") + _of(file), line)
        for file in files
        for line in records(file)
        if "MISSED" in (line.get("bound") or "")
    ]
    rows = [[name, cell(line), _goal(line["bound"])] for name, line in lines]
    return grid(["", "measured", "goal"], rows)


def _of(file: str) -> str:
    """What a file's name says of how its figures were taken."""
    told = {"busy": ", beside busy neighbours", "amd": ", AMD"}
    return "".join(said for part, said in told.items() if part in file.split("_"))


def _goal(bound: str) -> str:
    return bound.removesuffix(" MISSED").replace(">=", "≥").replace("<=", "≤")
