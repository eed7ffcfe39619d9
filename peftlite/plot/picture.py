"""Picture: a figure that no pyplot knows of, whose axes a notebook shows."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure


class Picture(Axes):
    """Axes that a notebook shows as the picture of their figure."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.figure.savefig(file, format="png")
        return file.getvalue()


def picture(width: float, height: float) -> Axes:
    """The axes of a new figure of so many inches."""
    return Figure(figsize=(width, height), layout="constrained").add_subplot(axes_class=Picture)
