"""The errors of a bank of deltas."""

import copy
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

import peftlite as pl
from peftlite.bank import DeltaBank
from tests.errors.case import Case

BANKS: WeakKeyDictionary[nn.Module, DeltaBank] = WeakKeyDictionary()
LORA = pl.LoRA(rank=2, targets="weight")


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def banked(slots: int = 2, dtype: torch.dtype = torch.float32) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = plain().to(dtype)
        BANKS[model] = bank = DeltaBank(model, slots, 2, LORA)
        for name in ("sql", "chat"):
            bank.load(name, LORA)
        return model

    return build


def of(model: nn.Module) -> DeltaBank:
    return BANKS[model]


def loading(source: Any, **options: Any) -> Callable[[Any, Path], Any]:
    return lambda model, path: of(model).load("new", source(model, path), **options)


def using(*names: Any) -> Callable[[Any, Path], Any]:
    def act(model: Any, _: Path) -> None:
        with of(model).rows(list(names)):
            model(torch.randn(2, 3, 4))

    return act


def elsewhere(method: Any, base: Callable[[], nn.Module] = plain) -> Callable[[Any, Path], Any]:
    return lambda *_: pl.attach(base(), method, "other")


def other_base() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).apply(lambda m: m.requires_grad_(False))


def other_sites() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def merged(*_: Any) -> pl.Delta:
    model = plain()
    delta = pl.attach(model, LORA, "other")
    pl.merge(model, "other")
    merged.model = model  # type: ignore  # kept, or the delta forgets
    return delta


def in_use(act: Callable[[Any, Path], Any], name: str = "sql") -> Callable[[Any, Path], Any]:
    def run(model: Any, path: Path) -> None:
        with of(model).use(name):
            act(model, path)

    return run


def closed() -> nn.Module:
    model = banked()()
    of(model).close()
    return model


def attached_beside() -> nn.Module:
    model = banked()()
    pl.attach(model, LORA, "beside")
    return model


def on_disk(slots: int = 1) -> nn.Module:
    """Two deltas that only disk holds, but for the one in the slot."""
    model = plain()
    BANKS[model] = bank = DeltaBank(model, slots, 2, LORA, memory_budget=1)
    for name in ("sql", "chat"):
        bank.load(name, LORA)
    return model


def cut_short(model: Any, _: Path) -> None:
    spilled = of(model)._slots.known["sql"].spilled
    assert spilled is not None
    spilled.write_bytes(b"1")
    of(model).prefetch("sql")


def rewritten(model: Any, path: Path) -> None:
    bank = of(model)
    pl.save(pl.attach(plain(), LORA, "other"), path)
    try:
        bank.load("other", path)
        pl.save(pl.attach(plain(), pl.LoRA(rank=1, targets="weight"), "other"), path)
        with bank.use("other"):
            pass
        bank.prefetch("sql")
        bank.prefetch("other")
    finally:
        bank.drop("other")
        path.unlink()


def dropped_on_the_way(model: Any, _: Path) -> None:
    slots = of(model)._slots
    fetch = slots.fetch

    def drop_first(entry: Any) -> Any:
        of(model).drop("sql")
        return fetch(entry)

    slots.fetch = drop_first
    of(model).prefetch("sql")


def waiting(model: Any, _: Path) -> None:
    """Waits for a delta that another thread fails to bring."""
    slots, coming, go = of(model)._slots, threading.Event(), threading.Event()

    def fail(entry: Any) -> Any:
        coming.set()
        go.wait(10)
        raise pl.FileError("gone")

    slots.fetch = fail
    thread = threading.Thread(target=_quietly, args=(functools.partial(of(model).prefetch, "sql"),))
    thread.start()
    coming.wait(10)
    threading.Timer(0.05, go.set).start()
    try:
        of(model).prefetch("sql")
    finally:
        thread.join()


def _quietly(call: Callable[[], None]) -> None:
    try:
        call()
    except pl.PeftliteError:
        pass


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(x.transpose(0, 1))


def turned() -> nn.Module:
    model = Turned()
    BANKS[model] = bank = DeltaBank(model, 1, 2, pl.LoRA(rank=2, targets="map"))
    bank.load("sql", pl.LoRA(rank=2, targets="map"))
    return model


def compiled(model: Any, _: Path) -> None:
    """What compiled code asks as it runs."""
    bank = of(model)
    bank.load("dry", pl.LoRA(rank=1, dropout=0.5, targets="weight"))
    with bank.train(["dry", None]):
        torch.ops.peftlite.rows(torch.randn(2, 4), bank._router.number, True)


def making(*args: Any, **options: Any) -> Callable[[Any, Path], Any]:
    return lambda model, _: DeltaBank(model, *args, **options)


CASES = [
    Case(making(0, 2), "slots is a positive whole number, not 0", model=plain),
    Case(making(2, True), "max_rank is a positive whole number, not True", model=plain),
    Case(making(2, 2, memory_budget=1.5), "memory_budget is a positive whole number, not 1.5",
         model=plain),
    Case(making(2, 2), "this model has a bank already: close it first, or use it", model=banked()),
    Case(lambda model, _: DeltaBank(nn.Conv1d(4, 2, 1), 2, 2, pl.IA3(targets="weight")),
         "weight isn't the weight of a linear map that is called, so its rows can't be "
         "told apart: leave it out of the bank's methods with exclude=",
         pl.TargetError, model=plain),
    Case(loading(lambda *_: 3), "a bank loads a file, a delta, or a method to begin with: not 3",
         model=banked()),
    Case(loading(lambda *_: LORA, check_base="no"),
         "check_base must be 'error', 'warn' or 'off', not 'no'", model=banked()),
    Case(loading(merged), "'other' is merged into its base: pl.unmerge it first", model=banked()),
    Case(loading(elsewhere(LORA, other_sites)),
         "'other' is of a model with other sites; here there is no 2.weight", model=banked()),
    Case(loading(elsewhere(LORA, other_base)),
         "'other' is of a model with other base weights: 0.weight; 1.weight differ; pass "
         "check_base='off' to load it all the same", pl.BaseMismatchError, model=banked()),
    Case(loading(elsewhere(pl.LoRA(rank=3, targets="weight"))),
         "0.weight: rank 3 is above the bank's max_rank 2", model=banked()),
    Case(loading(elsewhere(pl.BitFit(targets="0.bias"))),
         "the bank has no room for 0.bias: this delta is BitFit(targets='0.bias') at 0.bias; there "
         "is room for LoRA(targets='weight', rank=2) at 0.weight and 1 more, up to rank 2. Give "
         "methods= what it needs when the bank is made, such as pl.DeltaBank(model, 2, 2, "
         "methods=[its file]), or none, and load it before the first forward", model=banked()),
    Case(using(), "rows are a list, a name or None for each: not []", model=banked()),
    Case(using("sql", "chta"), "the bank has no delta named 'chta'; it has 'sql'; 'chat'",
         model=banked()),
    Case(using("sql"), "the bank is closed", model=closed),
    Case(using("sql"), "the bank is not the model's choice: pl.use(model, '(bank)')",
         model=attached_beside),
    Case(using("sql", "chat"), "2 deltas are named, for a bank of 1 slots", model=banked(1)),
    Case(in_use(lambda model, _: of(model).prefetch("chat")),
         "'chat' can't have a slot now; there are 'sql' (in use): leave a `with`, unpin or evict "
         "one, or make a bank of more slots", model=banked(1)),
    Case(using("sql", None, "chat"),
         "3 rows were named, and the batch has 2: name one delta, or None, per batch row; "
         "bank.rows(names, repeat=k) where k rows in turn share a name", model=banked()),
    Case(using("sql", None),
         "a map inside the model has an input of shape (3, 2, 4), which isn't a batch of 2 rows, "
         "one after another: leave it out of the bank's methods with exclude=", model=turned),
    Case(in_use(lambda model, _: of(model).evict("sql")),
         "'sql' is in use, so it can't leave its slot now", model=banked()),
    Case(in_use(lambda model, _: of(model).close()), "'sql' in use, so the bank can't be closed",
         model=banked()),
    Case(lambda model, _: of(model).static(2).set(["sql"]), "1 rows were named, and there are 2",
         model=banked()),
    Case(cut_short, "'…', spilled by a bank, was cut short", pl.FileError, model=on_disk),
    Case(rewritten,
         "'…sql.safetensors' has changed since 'other' was loaded from it: load it again",
         pl.FileError, model=on_disk),
    Case(dropped_on_the_way, "'sql' was dropped while it was brought in", model=on_disk),
    Case(waiting, "the delta could not be brought in: gone", model=on_disk),
    Case(compiled,
         "dropout of a delta isn't drawn by compiled code that trains many: leave dropout= out, or "
         "torch.compile", model=banked()),
    Case(lambda model, _: of(model).parameters("sql"),
         "0.weight has slots in torch.bfloat16, where small steps are lost: make room in fp32, as "
         "methods=pl.LoRA(dtype=torch.float32)", model=banked(dtype=torch.bfloat16)),
    Case(lambda model, _: (of(model).load("pissa", pl.LoRA(rank=1, init="pissa", targets="weight")),
                           of(model).parameters("pissa")),
         "0.weight: a LoRAPatch can't be trained in a bank, where it isn't the parameters alone",
         model=banked()),
    Case(lambda model, _: (of(model).load("pissa", pl.LoRA(rank=1, init="pissa", targets="weight")),
                           of(model).delta("pissa")),
         "0.weight: a LoRAPatch can't be read back out of a bank", model=banked()),
    Case(lambda model, _: (of(model).parameters("sql"), model.to("meta")),
         "deltas are in training in the model's bank: bank.evict them, then move the model",
         model=banked()),
    Case(lambda model, path: pl.save(pl.deltas(model)["(bank)"], path),
         "a bank isn't a delta: save each with bank.save(name, path)", model=banked()),
    Case(lambda model, _: copy.deepcopy(model),
         "a model with a bank can't be copied, pickled or viewed, for the bank's memory is one: "
         "bank.close() first, or copy the model before", model=banked()),
    Case(lambda model, _: model.__reduce_ex__(2) and __import__("pickle").dumps(model),
         "a model with a bank can't be copied, pickled or viewed, for the bank's memory is one: "
         "bank.close() first, or copy the model before", model=banked()),
]  # fmt: skip
