"""The methods: one file each, with its equation, its paper, its config and its patch."""

from peftlite.methods.bitfit import BitFit
from peftlite.methods.dora import DoRA
from peftlite.methods.full import FullTuning
from peftlite.methods.loha import LoHa
from peftlite.methods.lokr import LoKr
from peftlite.methods.lora import LoRA
from peftlite.methods.vera import VeRA

__all__ = ["BitFit", "DoRA", "FullTuning", "LoHa", "LoKr", "LoRA", "VeRA"]
