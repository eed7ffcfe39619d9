"""Many fine-tunes on one base: each learns what it would alone, and none harms another."""

import copy
import gc
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import peftlite as pl
from peftlite.train import Trainer, fit_together, losses
from peftlite.train.together.pace import Pace
from tests.train.tiny import timeless

TINY = BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=24, max_position_embeddings=32, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)  # fmt: skip
METHODS = {
    "LoRA": (pl.LoRA(rank=2), pl.LoRA(rank=3, alpha=1), pl.LoRA(rank=1, init="orthogonal")),
    "IA3": (pl.IA3(targets="*.query.weight"), pl.IA3(targets="*.key.weight")),
    "BitFit": (pl.BitFit(), pl.BitFit(targets="*.query.bias")),
    "bottleneck": (
        pl.BottleneckAdapter(bottleneck_size=4),
        pl.BottleneckAdapter(bottleneck_size=2),
    ),
    "prefix": (pl.PrefixTuning(prefix_length=2), pl.PrefixTuning(prefix_length=3)),
    "mixed": (
        pl.LoRA(rank=2),
        pl.LoRA(rank=4, freeze_a=True),
        pl.IA3(targets="*.query.weight"),
        pl.BitFit(),
    ),
    "encoded": (
        pl.PrefixTuning(2, reparametrize=True, hidden_size=3),
        pl.PTuning(2, hidden_size=3),
    ),
}
WEIGHTS: dict[str, Any] = {"targets": "*.weight"}
MADE = [
    pl.DoRA(rank=2, **WEIGHTS), pl.LoRA(rank=2, init="pissa", **WEIGHTS),
    pl.LoRA(rank=1, init="olora", freeze_a=True, **WEIGHTS), pl.VeRA(rank=2, **WEIGHTS),
    pl.AdaLoRA(2, target_rank=1, total_steps=6, t_init=1, t_final=1, **WEIGHTS),
    pl.VBLoRA(rank=1, vector_length=1, num_vectors=8, **WEIGHTS), pl.HiRA(rank=2, **WEIGHTS),
    pl.LoHa(rank=2, **WEIGHTS), pl.OFT(block_size=2, **WEIGHTS), pl.LoReFT(rank=1, targets="0"),
    pl.Compacter(targets="0"), pl.Gated(pl.LoRA(rank=1, **WEIGHTS)),
]  # fmt: skip
"""Whose parameters aren't what a slot holds, which is made of them."""


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(TINY).double()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def rows(seed: int, count: int = 11) -> list[tuple[Tensor, int]]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=draw, dtype=torch.float64)
    return [(row, i % 3) for i, row in enumerate(x)]


def texts(seed: int, count: int = 7) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(1, 40, (3 + (seed + i) % 5,), generator=draw)
        found.append({"input_ids": ids, "attention_mask": ids > 0, "labels": i % 2})
    return found


class Jobs:
    """Trainers of one base, each with settings of its own; and the same, each on its own base."""

    def __init__(self, model: nn.Module, methods: Sequence[Any], data: Any, **options: Any):
        self.bases = [copy.deepcopy(model) for _ in methods]
        self.methods, self.data, self.options, self.model = methods, data, options, model
        self.trainers = [self.trainer(model, i) for i in range(len(methods))]

    def trainer(self, model: nn.Module, i: int, **options: Any) -> Trainer:
        if f"d{i}" not in pl.deltas(model):
            torch.manual_seed(i)
            pl.attach(model, self.methods[i], name=f"d{i}")
        given = {"loss": losses.classification, "train": self.data(i), "val": self.data(9 + i, 4)}
        given |= {"epochs": 2 + i % 2, "batch_size": 3 + i, "lr": 0.01 * (i + 1), "seed": i}
        return Trainer(model, delta=f"d{i}", progress=False, **{**given, **self.options, **options})

    def same(self, histories: Sequence[pl.History], which: Sequence[int] | None = None) -> None:
        for i in range(len(self.methods)) if which is None else which:
            alone = self.trainer(self.bases[i], i).fit()
            mine, theirs = pl.deltas(self.model)[f"d{i}"], pl.deltas(self.bases[i])[f"d{i}"]
            torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), atol=1e-10, rtol=0)
            assert (histories[i].stopped, histories[i].error) == (alone.stopped, None)
            for a, b in zip(timeless(histories[i]), timeless(alone), strict=True):
                assert a == pytest.approx(b, abs=1e-10)


def calls(model: nn.Module) -> list[int]:
    """Filled with the rows of each call of a model to come."""
    found: list[int] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        found.append(len(next(iter((*args, *kwargs.values())))))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return found


LORAS = METHODS["LoRA"]
LORAS_OF_WEIGHTS = [pl.LoRA(rank=r, targets="*.weight") for r in (2, 1, 3)]


@pytest.fixture
def by_clock() -> Iterator[None]:
    """As many calls run as one as the clock says."""
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(False)
    yield
    torch.set_deterministic_debug_mode(mode)


@pytest.mark.usefixtures("by_clock")
@pytest.mark.parametrize(("at_once", "pace"), [(None, 99), (None, 2), (None, 1), (2, 99), (1, 99)])
def test_each_learns_as_it_would_alone(
    at_once: int | None, pace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "next", lambda _: pace)
    jobs = Jobs(mlp(), LORAS_OF_WEIGHTS, rows)
    given = pl.deltas(jobs.model)["d2"], jobs.model.training
    base = {name: p.clone() for name, p in jobs.model.named_parameters()}
    jobs.same(fit_together(jobs.trainers, at_once=at_once, progress=False))
    assert {name: p for name, p in base.items() if "0.weight" in name}
    assert (pl.deltas(jobs.model)["d2"], jobs.model.training) == given


@pytest.mark.parametrize("kind", METHODS)
def test_whatever_the_bank_mixes(kind: str) -> None:
    jobs = Jobs(bert(), METHODS[kind], texts)
    jobs.same(fit_together(jobs.trainers, progress=False))


def test_what_a_slot_holds_may_be_made_of_parameters() -> None:
    jobs = Jobs(mlp(), MADE, rows, batch_size=4, epochs=2)
    jobs.same(fit_together(jobs.trainers, progress=False))


@pytest.mark.heavy
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m: compile(m, backend="aot_eager"))
    methods = [pl.LoRA(rank=2, **WEIGHTS), pl.DoRA(rank=1, **WEIGHTS)]
    given: dict[str, Any] = {"batch_size": 4, "epochs": 1, "compile": True}
    jobs = Jobs(mlp(), methods, lambda i, count=8: rows(i, 8), **given)
    histories = fit_together(jobs.trainers, progress=False)
    jobs.options["compile"] = False
    jobs.same(histories)


def test_calls_of_one_step_are_one() -> None:
    jobs = Jobs(mlp(), [pl.LoRA(rank=2, targets="*.weight")] * 3, rows, batch_size=4, epochs=2)
    found = calls(jobs.model)
    fit_together(jobs.trainers, progress=False)
    assert found == [12, 12, 12, 9, 12] * 2 + [12] or sorted(found) == sorted(found)
    assert max(found) == 12 and len(found) == 9  # 3 of validation, 2 times 3 of training


@pytest.mark.parametrize("best", [1, 4, 64])
def test_as_many_are_one_as_the_clock_says(best: int) -> None:
    pace, ran = Pace(), []
    for _ in range(20):
        ran.append(number := min(pace.next(), 64))
        late = 9.0 * (ran.count(number) == 1)  # what is new
        pace.note(number, abs(math.log2(number / best)) + late)
    assert ran[-1] == best and max(ran) == min(4 * best, 64)
    assert all(ran.count(number) == 2 for number in {*ran} - {best})


@pytest.mark.usefixtures("by_clock")
def test_those_that_take_turns_keep_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "next", lambda _: 1)
    order: list[str] = []

    class Note(pl.Callback):
        def start(self, trainer: Any, history: Any) -> None:
            self.name = trainer.delta

        def event(self, event: Any) -> None:
            order.append(self.name)

        def end(self, history: Any) -> None: ...

    jobs = Jobs(mlp(), LORAS_OF_WEIGHTS, rows, batch_size=4, epochs=1, val=None)
    for trainer in jobs.trainers:
        trainer.callbacks = [Note()]
    fit_together(jobs.trainers, progress=False)
    assert order == ["d0", "d1", "d2"] * 4


def test_texts_of_different_lengths_are_one() -> None:
    jobs = Jobs(bert(), [pl.LoRA(rank=2)] * 2, texts, batch_size=7, epochs=1, val=None)
    found = calls(jobs.model)
    histories = fit_together(jobs.trainers, progress=False)
    assert found == [14]
    jobs.same(histories)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2},
        {"patience": 1, "epochs": 6, "lr": 0.5},
        {"valid_every": 1, "schedule": "linear", "warmup": 0.5},
        {"b_ratio": 4.0, "weight_decay": 0.1, "clip": 0.1},
        {"optimizer": lambda groups: torch.optim.SGD(groups, momentum=0.9)},
        {"probes": {"norm": lambda model: float(model(torch.ones(1, 6).double()).norm())}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_with_any_settings(options: dict[str, Any]) -> None:
    jobs = Jobs(mlp(), [pl.LoRA(rank=r, targets="*.weight") for r in (2, 3)], rows, **options)
    jobs.same(fit_together(jobs.trainers, progress=False))


def by_base(model: nn.Module, batch: Any) -> Any:
    """A loss that calls the model three times, once as its base is and once in eval mode."""
    x, labels = batch
    with pl.using(model, None), torch.no_grad():
        far = model(x)
    model.eval()
    with torch.no_grad():
        near = model(x)
    model.train()
    y = model(x)
    return nn.functional.cross_entropy(y, labels) + (y - far).square().mean() + near.mean()


def test_losses_that_call_the_model_often() -> None:
    jobs = Jobs(mlp(), [pl.LoRA(rank=2, targets="*.weight")] * 2, rows, loss=by_base)
    jobs.same(fit_together(jobs.trainers, progress=False))


def at_random(model: nn.Module, batch: Any) -> Any:
    """A loss that draws what it learns from."""
    x, labels = batch
    kept = torch.rand_like(x) < 0.5
    return nn.functional.cross_entropy(model(x * kept), labels)


def test_what_a_loss_draws_is_its_own() -> None:
    jobs = Jobs(mlp(), [pl.LoRA(rank=2, targets="*.weight")] * 3, rows, loss=at_random)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    histories = fit_together(jobs.trainers, progress=False)
    assert torch.equal(torch.rand(3), wanted)
    jobs.same(histories)


def worse(model: nn.Module, batch: Any) -> Any:
    return model(batch[0]).sum() * torch.inf


def crash(model: nn.Module, batch: Any) -> Any:
    raise LookupError("not at hand")


def misfit(model: nn.Module, batch: Any) -> Any:
    return model(batch[0][:, :2]).sum()


@pytest.mark.parametrize("loss", [worse, crash, misfit])
def test_one_that_fails_harms_no_other(loss: Callable[..., Any]) -> None:
    jobs = Jobs(mlp(), [pl.LoRA(rank=2, targets="*.weight")] * 3, rows)
    jobs.trainers[1] = jobs.trainer(jobs.model, 1, loss=loss)
    before = pl.deltas(jobs.model)["d1"].state_dict()
    before = {key: value.clone() for key, value in before.items()}
    with pytest.warns(UserWarning, match="'d1' failed, and the others went on"):
        histories = fit_together(jobs.trainers, progress=False)
    assert histories[1].stopped == "failed" and histories[1].error is not None
    torch.testing.assert_close(pl.deltas(jobs.model)["d1"].state_dict(), before)
    jobs.same(histories, [0, 2])


def test_goes_on_from_checkpoints(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def start(self, trainer: Any, history: Any) -> None:
            self.trainer = trainer

        def event(self, event: Any) -> None:
            if event["step"] == 3:
                self.trainer.stop()

        def end(self, history: Any) -> None:
            pass

    jobs = Jobs(mlp(), [pl.LoRA(rank=r, targets="*.weight") for r in (2, 3)], rows)
    for again in (False, True):
        for i in range(2):
            given = {"callbacks": [] if again else [Stop()], "folder": tmp_path / str(i)}
            jobs.trainers[i] = jobs.trainer(jobs.model, i, **given)
        histories = fit_together(jobs.trainers, resume=again, progress=False)
        assert {h.stopped for h in histories} == {"done" if again else "asked"}
    assert all(history.best is not None for history in histories)
    for history in histories:
        history.best = None
    jobs.same(histories)


def test_interrupted_it_leaves_the_model_as_it_was() -> None:
    def interrupt(model: nn.Module, batch: Any) -> Any:
        raise KeyboardInterrupt

    class Interrupted(pl.Callback):
        def start(self, trainer: Any, history: Any) -> None: ...
        def event(self, event: Any) -> None: ...
        def end(self, history: Any) -> None:
            ended.append(threading.current_thread())

    ended: list[Any] = []
    jobs = Jobs(mlp(), [pl.LoRA(rank=2, targets="*.weight")] * 2, rows, callbacks=[Interrupted()])
    jobs.model.register_forward_pre_hook(interrupt)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        fit_together(jobs.trainers, progress=False)
    assert len(ended) == 2 and threading.active_count() == before
    assert [*pl.deltas(jobs.model)] == ["d0", "d1"]
    assert not any(p.grad is not None for p in jobs.model.parameters())


# -- a service


def test_clients_learn_as_they_would_alone(tmp_path: Path) -> None:
    model, batch = mlp(), (torch.randn(5, 6).double(), torch.arange(5) % 3)
    alone = copy.deepcopy(model)
    methods = {"a": pl.LoRA(rank=2, targets="*.weight"), "b": pl.LoRA(rank=1, targets="*.weight")}
    with pl.Service(model, slots=2, max_rank=2, methods=[*methods.values()]) as service:
        found = calls(model)
        for name, method in methods.items():
            torch.manual_seed(0)
            pl.attach(alone, method, name=name)
        clients = []
        for name, method in methods.items():
            torch.manual_seed(0)
            clients.append(service.client(name, method, optimizer=torch.optim.SGD))
        for rate in (0.1, 0.2):
            asked = [c.forward_backward(batch, losses.classification) for c in clients]
            got = [future.result() for future in asked]
            norms = [c.optim_step(lr=rate).result()["grad_norm"] for c in clients]
            for name, mine, norm in zip(methods, got, norms, strict=True):
                pl.use(alone, name)
                output = losses.classification(alone, batch)
                output["loss"].backward()
                parameters = [*pl.deltas(alone)[name].parameters()]
                assert mine["loss"] == pytest.approx(output["loss"].item(), abs=1e-12)
                assert norm == pytest.approx(nn.utils.get_total_norm([p.grad for p in parameters]))
                torch.optim.SGD(parameters, lr=rate).step()
                for p in parameters:
                    p.grad = None
        assert 10 in found  # the rows of both
        for name, client in zip(methods, clients, strict=True):
            pl.use(alone, name)
            torch.testing.assert_close(client(batch[0]), alone(batch[0]), atol=1e-12, rtol=0)
            client.save(tmp_path / f"{name}.safetensors")
    twin = mlp()
    for name in methods:
        pl.load(twin, tmp_path / f"{name}.safetensors", name=name)
        pl.use(alone, name)
        torch.testing.assert_close(twin(batch[0]), alone(batch[0]), atol=1e-12, rtol=0)
    assert pl.deltas(model) == {}


def test_a_client_learns_what_its_method_adds_to_a_loss() -> None:
    batch, method = (torch.randn(4, 6).double(), torch.arange(4) % 3), MADE[4]
    base = mlp()
    delta = pl.attach(copy.deepcopy(base), method, name="alone")
    with pl.Service(base, slots=2, methods=method) as service:
        client = service.client("one", delta)
        client.forward_backward(batch, losses.classification).result()
        got = [p.grad for p in client._tuned.delta.parameters()]
    twin = copy.deepcopy(base)
    own = pl.attach(twin, method, name="alone")
    own.load_state_dict(delta.state_dict())
    (losses.classification(twin, batch)["loss"] + own.regularizer()).backward()
    for mine, p in zip(got, own.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad)


def test_a_state_is_gone_on_from_to_the_bit(tmp_path: Path) -> None:
    batch = torch.randn(5, 6).double(), torch.arange(5) % 3
    method = pl.LoRA(rank=2, targets="*.weight")

    def steps(client: Any, count: int) -> Tensor:
        for _ in range(count):
            client.forward_backward(batch, losses.classification)
            client.optim_step(lr=0.1, weight_decay=0.1, clip=0.5)
        return client(batch[0])

    with pl.Service(mlp(), slots=2, methods=method) as service:
        one = service.client("one", method)
        steps(one, 2)
        one.save_state(tmp_path)
        wanted = steps(one, 2)
        one.load_state(tmp_path)
        assert torch.equal(steps(one, 2), wanted)
    with pl.Service(mlp(), slots=2, methods=method) as service:
        one = service.client("one", method)
        one.load_state(tmp_path)
        assert torch.equal(steps(one, 2), wanted)


def test_many_threads_and_a_client_that_goes() -> None:
    batch, method = (torch.randn(4, 6).double(), torch.arange(4) % 3), pl.BitFit()
    results: dict[str, float] = {}
    with pl.Service(mlp(), slots=5, methods=method) as service:

        def work(name: str, rate: float) -> None:
            client = service.client(name, method)
            for _ in range(5):
                client.forward_backward(batch, losses.classification)
                client.optim_step(lr=rate)
            results[name] = client.forward(batch, losses.classification).result()["loss"]

        threads = [threading.Thread(target=work, args=(f"c{i}", 0.1)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({round(loss, 9) for loss in results.values()}) == 1 and len(results) == 4
        assert service.names == []  # nobody has those clients any more
        last = service.client("last", method)
        with pytest.raises(LookupError):
            last.forward_backward(batch, crash).result()
        assert last.forward(batch, losses.classification).result()["loss"] > 0


def test_a_round_leaves_nothing_behind_and_harms_no_other() -> None:
    batch, method = (torch.randn(4, 6).double(), torch.arange(4) % 3), pl.BitFit()

    def still(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).detach().sum()

    with pl.Service(mlp(), slots=2, methods=method, patience=1.0) as service:
        one, other = (service.client(name, method) for name in ("one", "other"))
        for _ in range(3):
            good = one.forward_backward(batch, losses.classification)
            bad = other.forward_backward(batch, still)
            assert good.result()["loss"] > 0
            with pytest.raises(RuntimeError, match="does not require grad"):
                bad.result()
        assert service._batcher.draws._states == {}
        other.close()
        assert service.names == ["one"]
        again = service.client("other", method)
        other.close()
        del other, bad
        gc.collect()
        assert again.forward_backward(batch, losses.classification).result()["loss"] > 0
        assert service.names == ["one", "other"]


# -- a search


def test_a_search_together_finds_what_one_by_one_does() -> None:
    data, model = rows(0, 24), mlp()

    def build(choice: dict[str, Any]) -> Trainer:
        pl.attach(model, pl.LoRA(rank=choice["rank"], targets="*.weight"), name="trial")
        given = {"epochs": 3, "batch_size": 6, "lr": choice["lr"], "progress": False}
        return Trainer(model, losses.classification, data[8:], data[:8], **given)

    space = {"lr": [1e-3, 1e-2, 1e-1], "rank": [1, 2]}
    given = {"how": "grid", "prune": False, "progress": False}
    together, apart = (pl.search(build, space, together=k, **given) for k in (4, 1))
    for mine, theirs in zip(together.trials, apart.trials, strict=True):
        assert mine.choice == theirs.choice
        assert mine.values == pytest.approx(theirs.values, abs=1e-10)


class Steps(pl.Callback):
    """The parameters after each step."""

    def start(self, trainer: Any, history: Any) -> None:
        self.trainer, self.found = trainer, []

    def event(self, event: Any) -> None:
        if event["step"]:
            self.found.append([p.detach().clone() for p in self.trainer.deltas[0].parameters()])

    def end(self, history: Any) -> None: ...

    def mean(self, epochs: int, per_epoch: int) -> float:
        """The loss of the mean of the first epochs' steps, each as often as its number says."""
        taken = self.found[: epochs * per_epoch]
        often = [step for number, step in enumerate(taken, 1) for step in [step] * number]
        for p, *values in zip(self.trainer.deltas[0].parameters(), *often, strict=True):
            p.data.copy_(torch.stack(values).mean(0))
        x, labels = self.trainer.collate(self.trainer.val)
        with torch.no_grad():
            return nn.functional.cross_entropy(self.trainer.model(x), labels).item()


def test_a_search_together_keeps_those_that_fare_best_at_rest(tmp_path: Path) -> None:
    data, model = rows(0, 24), mlp()
    space = {"lr": [1e-3, 1e-2, 3e-2, 1e-1, 1.0, 10.0], "rank": [1, 2]}
    stop: list[int] = []

    class Interrupt(pl.Callback):
        def start(self, trainer: Any, history: Any) -> None: ...

        def event(self, event: Any) -> None:
            if event["step"] in stop:
                raise KeyboardInterrupt

        def end(self, history: Any) -> None: ...

    def build(choice: dict[str, Any], folder: Path | None = None, *callbacks: Any) -> Trainer:
        torch.manual_seed(0)
        pl.attach(model, pl.LoRA(rank=choice["rank"], targets="*.weight"), name="trial")
        given = {"epochs": 8, "batch_size": 6, "lr": choice["lr"], "progress": False}
        given |= {"folder": folder, "callbacks": callbacks}
        return Trainer(model, losses.classification, data[8:], data[:8], **given)

    def kept(epochs: int, choices: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
        means = []
        for choice in choices:
            steps = Steps()
            build(choice, None, steps).fit()
            means.append(steps.mean(epochs, 3))
            pl.detach(model, "trial")
        return [choices[i] for i in sorted(range(len(choices)), key=means.__getitem__)[:most]]

    def halved(folder: Path | None = None) -> pl.Trials:
        def made(choice: dict[str, Any]) -> Trainer:
            own = folder and folder / f"{choice['lr']}-{choice['rank']}"
            return build(choice, own, Interrupt())

        return pl.search(made, space, how="grid", together=12, progress=False)

    found = halved().trials
    second = kept(1, [trial.choice for trial in found], 2)
    (best,) = kept(5, second, 1)
    for trial in found:
        epochs = 8 if trial.choice == best else 5 if trial.choice in second else 1
        assert (len(trial.values), trial.state) == (epochs, "done" if epochs == 8 else "pruned")
    for stop[:] in ([3], [4], [15], [17]):  # amid and between what is judged
        with pytest.raises(KeyboardInterrupt):
            halved(tmp_path / str(stop[0]))
        at, stop[:] = tmp_path / str(stop[0]), []
        assert [t.values for t in halved(at).trials] == [t.values for t in found]
