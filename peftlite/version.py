"""The version of the library; that of the file format is in `io`."""

VERSION = "0.1.0"
