"""Deltas on disk."""

from peftlite.io.content import Info
from peftlite.io.load import inspect, load
from peftlite.io.native import save

__all__ = ["Info", "inspect", "load", "save"]
