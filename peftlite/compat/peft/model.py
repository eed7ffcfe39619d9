"""PeftModel: a model of any kind with PEFT's verbs, each of them one of peftlite's.

    model = get_peft_model(base, LoraConfig())     model is base

peft wraps a model and hands every call and attribute through. Here the model is itself the
PeftModel: as everywhere in peftlite its class is swapped, for one that has PeftModel's attributes
before its own, until its last adapter is off. So `generate`, `config`, `parameters()`, a Trainer,
`torch.compile` and `isinstance(model, PreTrainedModel)` need nothing handed through, and its
parameters keep the base's names. `model.base_model.model` is the model, once more.

A choice is peft's: an adapter that is set is the one that trains.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlite.compat.peft.configs import PeftConfig, folder_of
from peftlite.compat.peft.methods import Wanted
from peftlite.compat.peft.weighted import weighted
from peftlite.core.attach import check, commit, deltas, detach, new_delta
from peftlite.core.delta import Delta
from peftlite.core.find import require
from peftlite.core.host import Host, base_class, lay_over
from peftlite.core.turns import turn
from peftlite.errors import PeftliteError
from peftlite.io.export import export
from peftlite.io.files import replacing
from peftlite.io.load import load, read
from peftlite.io.peft.folder import CONFIG, MODEL, PROMPTS
from peftlite.io.peft.writing import plan
from peftlite.methods.adalora import AdaLoRA
from peftlite.methods.features import arguments
from peftlite.verbs.merge import merge, unmerge
from peftlite.verbs.use import use, using

BASE = "__base__"  # peft's name for no adapter, in a mixed batch
Names = str | Sequence[str]


class PeftModel(nn.Module):
    """What a model with adapters has beside its own: PEFT's verbs.

    Example:
        from peftlite.compat.peft import LoraConfig, get_peft_model

        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"]))
        model.print_trainable_parameters()
        model.save_pretrained("adapter")
    """

    peft_config: dict[str, PeftConfig]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if issubclass(cls, Host) or not args:
            return super().__new__(cls)
        return get_peft_model(*args, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any):
        if "_parameters" not in self.__dict__:  # else it's a model, which was made before
            super().__init__(*args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        **_: Any,
    ) -> Any:
        """A model with the adapter of a folder, as the active one. Raises FileError.

        The folder is here, inside another as `subfolder`, or on the hub, where `revision` is of it.
        """
        folder = folder_of(model_id, subfolder, revision)
        config = _load(model, folder, adapter_name, is_trainable, config)
        return _faced(model, adapter_name, config)

    # -- calls

    def __call__(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        with self._by_rows(adapter_names, kwargs):
            output = super().__call__(*args, **kwargs)
        return self._regularized(output)

    def generate(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """The model's own `generate`, with an adapter for each row if they are named."""
        own: Any = super()
        with self._by_rows(adapter_names, kwargs, kwargs.get("num_beams") or 1):
            return own.generate(*args, **kwargs)

    def _by_rows(
        self, names: Sequence[str] | None, kwargs: dict[str, Any], beams: int = 1
    ) -> AbstractContextManager[None]:
        if names is None:
            return nullcontext()
        if "use_cache" in arguments(self):  # which is of all rows together
            kwargs.setdefault("use_cache", False)
        rows = [None if name == BASE else name for name in names for _ in range(beams)]
        return using(self, rows=rows)

    def _regularized(self, output: Any) -> Any:
        """An output with what peft's AdaLoRA adds to its loss: the mean of ‖PᵀP − I‖."""
        if all(config.peft_type != "ADALORA" for config in self.peft_config.values()):
            return output
        own = self._allocated()
        factors = [x for item in own for x in (item.patch.q, item.patch.p.mT)]
        if factors and isinstance(loss := getattr(output, "loss", None), Tensor):
            norms = [torch.linalg.matrix_norm(x @ x.mT - torch.eye(len(x)).to(x)) for x in factors]
            output.loss = loss + own[0].method.orth_reg_weight * torch.stack(norms).mean()
        return output

    def update_and_allocate(self, global_step: int) -> None:
        """Lets AdaLoRA act, after the optimizer's step and before its gradients are cleared."""
        for item in self._allocated():
            item.patch.taken.fill_(global_step - 1)
        for name in self.active_adapters:
            self._delta(name).step()

    def _allocated(self) -> list[Any]:
        """What AdaLoRA has at each module of the active adapters."""
        on = (item for name in self.active_adapters for item in self._delta(name).placed.values())
        return [item for item in on if isinstance(item.method, AdaLoRA)]

    # -- choosing

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that are on, merged ones included."""
        registry = require(self)[1]
        return [*registry.merged, *registry.choice.standing]

    @property
    def active_adapter(self) -> Any:
        """The name of the adapter that is on; a list of them, if they are several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def set_adapter(self, adapter_name: Names, inference_mode: bool = False) -> None:
        """Makes an adapter, or several, the active ones, and those that train."""
        names = [adapter_name] if isinstance(adapter_name, str) else [*adapter_name]
        use(self, names)
        for name, delta in deltas(self).items():
            delta.requires_grad_(name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: Names, requires_grad: bool = True) -> None:
        """Makes adapters trainable, or freezes them."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._delta(name).requires_grad_(requires_grad)

    def disable_adapter_layers(self) -> None:
        """Takes all adapters out of the model's calls, until `enable_adapter_layers`."""
        self.__dict__.setdefault("_enabled", require(self)[1].choice.standing)
        use(self, None)

    def enable_adapter_layers(self) -> None:
        """Chooses what was chosen before `disable_adapter_layers`."""
        use(self, self.__dict__.pop("_enabled", require(self)[1].choice.standing))

    def disable_adapter(self) -> AbstractContextManager[None]:
        """A `with` in which the base runs alone; what is merged into it stays."""
        return using(self, None)

    # -- adapters come and go

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, **_: Any) -> None:
        """Adds a fresh adapter, which is neither active nor trains."""
        with self._choice_kept():
            attached(self, peft_config, adapter_name).requires_grad_(False)
        self.peft_config[adapter_name] = peft_config

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        subfolder: str | None = None,
        revision: str | None = None,
        **_: Any,
    ) -> None:
        """Adds the adapter of a folder, which isn't active. Raises FileError."""
        folder = folder_of(model_id, subfolder, revision)
        with self._choice_kept():
            self.peft_config[adapter_name] = _load(self, folder, adapter_name, is_trainable)

    def delete_adapter(self, adapter_name: str) -> None:
        """Takes an adapter off; if it was active, the first of the others is."""
        was, delta = self.active_adapters, self._delta(adapter_name)
        del self.peft_config[adapter_name]
        detach(self, delta)
        if was == [adapter_name] and (others := [*deltas(self)]):
            self.set_adapter(others[0])

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        **more: Any,
    ) -> None:
        """Adds an adapter made of others, all of them LoRA, as peft combines them; see weighted.py.

        Raises PeftliteError.
        """
        if more.get("svd_clamp") is not None:
            raise PeftliteError("peftlite has no svd_clamp=: leave it out")
        terms = [(self._delta(name), w) for name, w in zip(adapters, weights, strict=True)]
        with self._choice_kept():
            rank = weighted(
                self, terms, adapter_name, combination_type, svd_rank, density,
                majority_sign_method,
            )  # fmt: skip
        sizes = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
        self.peft_config[adapter_name] = replace(self.peft_config[adapters[0]], **sizes)

    @contextlib.contextmanager
    def _choice_kept(self) -> Iterator[None]:
        standing = require(self)[1].choice.standing
        yield
        use(self, standing)

    def _delta(self, name: str) -> Delta:
        found = deltas(self)
        if name not in found:
            raise PeftliteError(f"no adapter is named {name!r}; there are: {', '.join(found)}")
        return found[name]

    # -- merging

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, **_: Any) -> None:
        """Writes the active adapters, or those named, into the base. `unmerge_adapter` is exact."""
        for name in adapter_names or require(self)[1].choice.standing:
            merge(self, name)

    def unmerge_adapter(self) -> None:
        """Takes what is merged out of the base again, to the last bit."""
        for name in reversed([*require(self)[1].merged]):
            unmerge(self, name)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> Any:
        """The base with the active adapters, or those named, in it, and none beside it."""
        names = [*(adapter_names or self.active_adapters)]
        self.unmerge_adapter()
        for name in [*deltas(self)]:
            if name not in names:
                detach(self, name)
        for name in names:
            merge(self, name, backup="none")
        self.__dict__.pop("peft_config", None)
        return self

    def unload(self) -> Any:
        """The base, as it was before the first adapter."""
        for name in reversed([*deltas(self)]):
            detach(self, name)
        self.__dict__.pop("peft_config", None)
        return self

    # -- what it says of itself

    @property
    def base_model(self) -> Any:
        """What peft has around the base: `.model` is the model; all else is its own base's."""
        own: Any = super()
        child = self._modules.get("base_model")
        return child or _Tuner(self, getattr(own, "base_model", self))

    def get_base_model(self) -> Any:
        """The model."""
        return self

    @property
    def peft_type(self) -> str:
        """peft's name of the active adapter's method."""
        return self.active_peft_config.peft_type

    @property
    def active_peft_config(self) -> PeftConfig:
        """The settings of the active adapter."""
        return self.peft_config[self.active_adapters[0]]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers train, and how many there are."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Prints how many numbers train, of how many."""
        n, of = self.get_nb_trainable_parameters()
        print(f"trainable params: {n:,d} || all params: {of:,d} || trainable%: {100 * n / of:.4f}")

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool = True,
        save_embedding_layers: bool | str = "auto",
        **_: Any,
    ) -> None:
        """Writes adapters as folders of peft's, "default" into the folder itself.

        Raises PeftliteError, FileError.
        """
        if not safe_serialization:
            raise PeftliteError("peftlite writes no pickles: leave safe_serialization= out")
        if save_embedding_layers is True:
            raise PeftliteError(
                "a folder of peftlite's holds what an adapter changes, and no embedding of the "
                "base's: leave save_embedding_layers= out, and have those that train in "
                "modules_to_save"
            )
        for name in selected_adapters or [*deltas(self)] if is_main_process else ():
            with tempfile.TemporaryDirectory() as made:
                export(self._delta(name), Path(made) / "new", settings=self._said(name))
                # whatever else is in the folder, as a Trainer's checkpoint, stays
                folder = Path(save_directory) / ("" if name == "default" else name)
                folder.mkdir(parents=True, exist_ok=True)
                for file in (MODEL, CONFIG):
                    with replacing(folder / file) as new:
                        new.write((Path(made) / "new" / file).read_bytes())

    def _said(self, name: str) -> dict[str, Any]:
        """What a config says of the base, and of what it is for."""
        data = self.peft_config[name].given()
        kind: Any = base_class(self)
        if not data.get("task_type"):  # by which AutoPeftModel knows the base's class
            its = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
            data = {"auto_mapping": its, **data}
        kept = ("task_type", "base_model_name_or_path", "revision", "auto_mapping")
        return {key: data[key] for key in kept if data.get(key)}


class _Tuner:
    """What peft has between a PeftModel and the base: `model`, and whatever either has."""

    def __init__(self, model: Any, base: Any):
        self.model, self._base = model, base

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        own = hasattr(PeftModel, name) or name == "peft_config"
        return getattr(self.model if own else self._base, name)


class PeftModelForSequenceClassification(PeftModel):
    """A classifier of texts, whose head trains and is saved."""


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder and a decoder."""


class PeftModelForCausalLM(PeftModel):
    """A language model."""


class PeftModelForTokenClassification(PeftModel):
    """A classifier of tokens, whose head trains and is saved."""


class PeftModelForQuestionAnswering(PeftModel):
    """What finds an answer in a text; its head trains and is saved."""


class PeftModelForFeatureExtraction(PeftModel):
    """A model that gives features."""


_BY_TASK = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def get_peft_model(
    model: Any,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    **_: Any,
) -> Any:
    """The model, with a fresh adapter that is active and trains. Raises PeftliteError.

    Args:
        mixed: nothing: adapters of several methods go together anyway.
        autocast_adapter_dtype: whether the adapter is fp32 where the base is half precision.
        revision: of the base, for the config.

    Example:
        from peftlite.compat.peft import LoraConfig, get_peft_model

        model = get_peft_model(nn.Sequential(nn.Linear(4, 2)), LoraConfig(target_modules="0"))
    """
    peft_config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    peft_config.revision = revision or peft_config.revision
    attached(model, peft_config, adapter_name, autocast_adapter_dtype)
    return _faced(model, adapter_name, peft_config)


def inject_adapter_in_model(
    peft_config: PeftConfig, model: Any, adapter_name: str = "default", **_: Any
) -> Any:
    """The model, with a fresh adapter and without PeftModel's verbs. Raises PeftliteError.

    Example:
        from peftlite.compat.peft import LoraConfig, inject_adapter_in_model

        model = nn.Sequential(nn.Linear(4, 2))
        inject_adapter_in_model(LoraConfig(target_modules=["0"]), model)
    """
    attached(model, peft_config, adapter_name)
    return _knowing(model, adapter_name, peft_config)


def attached(
    model: Any, config: PeftConfig, name: str, autocast: bool = True, trained: bool = True
) -> Delta:
    """A fresh delta, attached as `pl.attach` does it. Raises PeftliteError.

    Args:
        autocast: whether it is fp32 where the base is half precision.
        trained: see `Wanted`.
    """
    with turn(model):
        check(model, name)
        wanted = Wanted(config, model, trained)
        dtype = None if autocast else next(model.parameters()).dtype
        delta = new_delta(model, [replace(m, dtype=dtype) for m in wanted.methods], name)
        if not any(p.is_meta for p in delta.parameters()):
            wanted.begin(delta)
            plan(delta, wanted.task)  # refuses what peft couldn't save
        delta.requires_grad_(not config.inference_mode)
        return commit(model, delta)


def _load(
    model: Any, folder: Path, name: str, trainable: bool, config: PeftConfig | None = None
) -> PeftConfig:
    """Attaches the adapter of a folder; a prompt's outputs keep its positions, as peft's do."""
    config = config or PeftConfig.from_pretrained(folder)
    config.inference_mode = not trainable
    if config.peft_type in PROMPTS[:2]:
        values = read(model, folder, "error").state_dict()
        attached(model, config, name, trained=False).load_state_dict(values)
    else:
        load(model, folder, name, trainable=trainable)
    return config


def _knowing(model: Any, name: str, config: PeftConfig) -> Any:
    model.__dict__.setdefault("peft_config", {})[name] = config
    return model


def _faced(model: Any, name: str, config: PeftConfig) -> Any:
    task: Any = config.to_dict()["task_type"]
    if not isinstance(model, PeftModel):
        lay_over(model, _BY_TASK.get(task, PeftModel))
    return _knowing(model, name, config)


class AutoPeftModel:
    """A base of transformers' and the adapter of a folder, which names the base.

    `AutoPeftModelForCausalLM` and the like say of which kind it is.
    """

    auto: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base, by what the folder says of it, with the adapter. Raises PeftliteError.

        Where its tokenizer is in the folder, too, and has more tokens, they get embeddings.
        """
        import transformers

        folder = folder_of(path, None, revision)
        config = config or PeftConfig.from_pretrained(folder)
        said = config.given().get("auto_mapping") or {}
        known = said.get("base_model_class") or "AutoModel"  # looked up in transformers alone
        auto = cls.auto or _AUTO.get(config.task_type or "", known)
        if not config.base_model_name_or_path:
            raise PeftliteError(
                f"{os.fspath(path)!r} doesn't say what its base is: load that yourself, then "
                "PeftModel.from_pretrained(base, path)"
            )
        where = {"revision": config.revision} if config.revision else {}
        kind: Any = getattr(transformers, auto)
        base = kind.from_pretrained(config.base_model_name_or_path, **where, **kwargs)
        if (folder / "tokenizer_config.json").is_file():
            tokens = len(transformers.AutoTokenizer.from_pretrained(folder))
            if tokens > base.get_input_embeddings().num_embeddings:
                base.resize_token_embeddings(tokens)
        return PeftModel.from_pretrained(base, folder, adapter_name, is_trainable, config)


_AUTO = {
    task: kind.__name__.replace("Peft", "Auto")
    for task, kind in _BY_TASK.items()
    if task != "FEATURE_EXTRACTION"  # for which transformers has AutoModel
}


def _auto(task: str) -> type[AutoPeftModel]:
    its = {"auto": _AUTO.get(task, "AutoModel"), "__module__": __name__}
    return type(f"Auto{_BY_TASK[task].__name__}", (AutoPeftModel,), its)


AutoPeftModelForSequenceClassification: type[AutoPeftModel] = _auto("SEQ_CLS")
AutoPeftModelForSeq2SeqLM: type[AutoPeftModel] = _auto("SEQ_2_SEQ_LM")
AutoPeftModelForCausalLM: type[AutoPeftModel] = _auto("CAUSAL_LM")
AutoPeftModelForTokenClassification: type[AutoPeftModel] = _auto("TOKEN_CLS")
AutoPeftModelForQuestionAnswering: type[AutoPeftModel] = _auto("QUESTION_ANS")
AutoPeftModelForFeatureExtraction: type[AutoPeftModel] = _auto("FEATURE_EXTRACTION")
