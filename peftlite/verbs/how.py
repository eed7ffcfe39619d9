"""How: the ways in which deltas are combined, by name; a file that needs no torch."""

from typing import Literal

How = Literal["sum", "linear", "cat", "svd", "ties", "dare", "magnitude_prune"]
