"""Fast paths of the low-rank product, the reference they are tested against, and their choice."""

from peftlite.kernels.dispatch import backend
from peftlite.kernels.linear import lora_linear
from peftlite.kernels.reporting import report
from peftlite.kernels.tiles import log_probs

__all__ = ["backend", "log_probs", "lora_linear", "report"]
