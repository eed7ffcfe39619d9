"""Plots: what was learned, drawn by matplotlib, which is imported when the first is asked for.

Each function draws into `ax`, or else into a figure of its own, and gives the Axes: as the last
thing in a notebook's cell that shows the picture, and `.figure.savefig(path)` writes it. Nothing of
pyplot's state is read or changed. Text has the colour of the current style, light or dark, and
lines have colours that are told apart without seeing red and green.
"""

from peftlite.plot.bars import bank
from peftlite.plot.changes import change, similarity
from peftlite.plot.curves import history
from peftlite.plot.points import quality

__all__ = ["bank", "change", "history", "quality", "similarity"]
