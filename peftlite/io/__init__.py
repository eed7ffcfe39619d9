"""Deltas in files: peftlite's own format, in one safetensors file."""

from peftlite.io.native import Info, inspect, load, save

__all__ = ["Info", "inspect", "load", "save"]
