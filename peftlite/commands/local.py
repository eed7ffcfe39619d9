"""What is local: a folder of transformers, with nothing fetched or run."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftlite.errors import FileError, PeftliteError, reason
from peftlite.io.base import is_packed
from peftlite.quant.holder import packings
from peftlite.table import listed
from peftlite.verbs.quantize import quantize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")  # what one is saved in
LONGEST = 200  # letters of what transformers says of a folder


def model(folder: str, dtype: str = "auto", packed: str | None = None) -> Any:
    """The causal language model in a folder, in evaluation mode. Raises FileError.

    What is packed there stays so, and needs no library of those who packed it.

    Args:
        dtype: "auto", as its files have it, for deltas know a base by its very numbers; or one of
            DTYPES.
        packed: the kind of `pl.quantize`, which packs it; None leaves it as it is.
    """
    model, found = _model("AutoModelForCausalLM", folder, dtype)
    if lacking := sorted(found["missing_keys"]):  # which transformers makes up
        raise FileError(
            f"{folder!r} is no causal language model, or not all of one: it lacks {listed(lacking)}"
        )
    return _packed(model, packed)


def encoder(folder: str, dtype: str = "auto", packed: str | None = None) -> Any:
    """The model in a folder without a head, in evaluation mode. Raises FileError."""
    return _packed(_model("AutoModel", folder, dtype)[0], packed)


def _packed(model: Any, kind: str | None) -> Any:
    if kind is not None:
        if any(map(packings, model.modules())):
            raise PeftliteError("the model is packed already: leave out --quantize")
        quantize(model, kind)
    return model


def device(name: str | torch.device) -> torch.device:
    """A device by its name. Raises PeftliteError if it isn't there."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise PeftliteError(f"there is no device {str(name)!r} here: {reason(error)}") from error


def config(folder: str) -> Any:
    """The configuration of the model in a folder. Raises FileError."""
    return _from("AutoConfig", folder)


def tokenizer(folder: str) -> Any:
    """The tokenizer in a folder. Raises FileError."""
    return _from("AutoTokenizer", folder)


def _model(auto: str, folder: str, dtype: str) -> tuple[Any, dict[str, Any]]:
    """A model in evaluation mode, and what transformers tells of how it was read."""
    if Path(folder).is_dir() and is_packed(folder):
        return _filled(auto, folder, dtype).eval(), {"missing_keys": ()}
    options = {"use_safetensors": True, "output_loading_info": True}
    model, found = _from(auto, folder, dtype=DTYPES.get(dtype, dtype), **options)
    return model.eval(), found


def _filled(auto: str, folder: str, dtype: str) -> Any:
    """A model whose folder has packed tensors: built without numbers, then filled with those."""
    how = config(folder)
    said = how.__dict__.pop("quantization_config", None)  # or transformers asks for its library
    with _without_numbers():
        model = _from(auto, folder, config=how)
    quantize(model, checkpoint=folder)
    _cast(model, DTYPES.get(dtype, how.dtype))
    if said is not None:
        how.quantization_config = said
    if (Path(folder) / "generation_config.json").exists():
        model.generation_config = _from("GenerationConfig", folder)
    return model


@contextmanager
def _without_numbers() -> Iterator[None]:
    """Parameters of modules that are made go to the meta device; buffers are computed."""
    register = nn.Module.register_parameter

    def empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # a tied one is there already
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = empty
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _cast(model: nn.Module, dtype: torch.dtype | None) -> None:
    """To a dtype, but for what is computed and in no file: rotary frequencies stay exact."""
    kept = [(m, n, m._buffers[n]) for m in model.modules() for n in m._non_persistent_buffers_set]
    if dtype is not None:
        model.to(dtype)
    for module, name, buffer in kept:
        module._buffers[name] = buffer


def _from(auto: str, folder: str, config: Any = None, **options: Any) -> Any:
    """What transformers makes of a folder, or of a config alone. Raises FileError."""
    try:
        import transformers
    except ImportError as error:
        raise PeftliteError("this needs transformers: pip install transformers") from error
    if not Path(folder).is_dir():
        raise FileError(f"there is no folder {folder!r} of a model, as save_pretrained leaves one")
    if auto == "AutoTokenizer" and not any(map(list, map(Path(folder).glob, TOKENIZERS))):
        raise FileError(
            f"{folder!r} has no tokenizer: tokenizer.save_pretrained({folder!r}) puts one there"
        )
    try:
        with _quiet(transformers.logging):
            kind = getattr(transformers, auto)
            if config is not None:
                return kind.from_config(config)
            return kind.from_pretrained(
                str(Path(folder)), local_files_only=True, trust_remote_code=False, **options
            )
    except Exception as error:  # whatever transformers raises of files that it doesn't know
        first = str(error).strip().partition("\n")[0]
        first = first if len(first) <= LONGEST else f"{first[:LONGEST]} …"
        raise FileError(f"{folder!r} can't be read by transformers: {first}") from error


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """No warnings of transformers, whose causes are looked for here; bars on a terminal alone."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
