"""Algebra on what deltas do to the weights, whatever their methods."""

from peftlite.algebra.combine import combine, rescale, resize_rank
from peftlite.algebra.extract import extract

__all__ = ["combine", "extract", "rescale", "resize_rank"]
