"""The errors: one class, with subclasses only where a caller would catch them apart."""


class PeftliteError(Exception):
    """Something asked of peftlite can't be done. Nothing was changed."""


class TargetError(PeftliteError):
    """A target names no site, or a site the method can't take."""


class FileError(PeftliteError):
    """A file isn't a delta, is damaged, or doesn't fit the model."""


class BaseMismatchError(FileError):
    """A delta was made for other base weights than the model has."""
