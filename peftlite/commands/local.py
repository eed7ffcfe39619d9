"""What is local: a folder of transformers, with nothing fetched or run."""

from pathlib import Path
from typing import Any

from peftlite.errors import FileError, PeftliteError


def model(folder: str) -> Any:
    """The causal language model in a folder, in evaluation mode. Raises FileError."""
    return _from("AutoModelForCausalLM", folder, use_safetensors=True).eval()


def encoder(folder: str) -> Any:
    """The model in a folder without a head, in evaluation mode. Raises FileError."""
    return _from("AutoModel", folder, use_safetensors=True).eval()


def config(folder: str) -> Any:
    """The configuration of the model in a folder. Raises FileError."""
    return _from("AutoConfig", folder)


def tokenizer(folder: str) -> Any:
    """The tokenizer in a folder. Raises FileError."""
    return _from("AutoTokenizer", folder)


def _from(auto: str, folder: str, **options: Any) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise PeftliteError("this needs transformers: pip install transformers") from error
    if not Path(folder).is_dir():
        raise FileError(f"there is no folder {folder!r} of a model, as save_pretrained leaves one")
    try:
        return getattr(transformers, auto).from_pretrained(
            str(Path(folder)), local_files_only=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise FileError(f"{folder!r} can't be read by transformers: {first}") from error
