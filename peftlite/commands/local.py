"""What is local: a folder of transformers, with nothing fetched or run."""

from pathlib import Path
from typing import Any

from peftlite.errors import FileError, PeftliteError

TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")  # what one is saved in


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
    except Exception as error:  # whatever transformers raises of files that it doesn't know
        if auto == "AutoTokenizer" and not any(map(list, map(Path(folder).glob, TOKENIZERS))):
            raise FileError(
                f"{folder!r} has no tokenizer: tokenizer.save_pretrained({folder!r}) puts one there"
            ) from error
        first = str(error).strip().partition("\n")[0]
        raise FileError(f"{folder!r} can't be read by transformers: {first}") from error
