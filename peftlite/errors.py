"""The errors: one class, with subclasses only where a caller would catch them apart."""


class PeftliteError(Exception):
    """Something asked of peftlite can't be done. Nothing was changed."""

    def __init__(self, message: str = ""):
        # a name in a stranger's file may be of any length: its beginning and its end are enough
        most = 2000
        short = len(message) <= most
        super().__init__(message if short else f"{message[: most - 503]} … {message[-500:]}")


class TargetError(PeftliteError):
    """A target names no site, or a site the method can't take."""


class FileError(PeftliteError):
    """A file isn't a delta, is damaged, or doesn't fit the model."""


class BaseMismatchError(FileError):
    """A delta was made for other base weights than the model has."""


def reason(error: Exception) -> str:
    """Why another library's call, or the system's, failed, in a line."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]
