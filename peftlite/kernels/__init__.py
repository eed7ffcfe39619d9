"""Fast paths of the low-rank product, the reference they are tested against, and their choice."""

from peftlite.kernels.dispatch import backend
from peftlite.kernels.linear import lora_linear
from peftlite.kernels.reporting import report

__all__ = ["backend", "lora_linear", "report"]
