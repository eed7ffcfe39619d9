"""The version of the library; that of the file format is in `io`."""

__version__ = "0.1.0"
