"""The methods: one file each, with its equation, its paper, its config and its patch."""

from peftlite.methods.bitfit import BitFit
from peftlite.methods.full import FullTuning
from peftlite.methods.lora import LoRA

__all__ = ["BitFit", "FullTuning", "LoRA"]
