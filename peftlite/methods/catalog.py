"""Every method by name: made by `python -m tests.made` from the files beside it."""

from peftlite.methods.adalora import AdaLoRA
from peftlite.methods.bitfit import BitFit
from peftlite.methods.boft import BOFT
from peftlite.methods.bottleneck import BottleneckAdapter
from peftlite.methods.compacter import Compacter
from peftlite.methods.diff_pruning import DiffPruning
from peftlite.methods.dora import DoRA
from peftlite.methods.fourier import FourierFT
from peftlite.methods.full import FullTuning
from peftlite.methods.gated import Gated
from peftlite.methods.hira import HiRA
from peftlite.methods.hra import HRA
from peftlite.methods.ia3 import IA3
from peftlite.methods.loha import LoHa
from peftlite.methods.lokr import LoKr
from peftlite.methods.lora import LoRA
from peftlite.methods.loreft import LoReFT
from peftlite.methods.ltsft import LTSFT
from peftlite.methods.norm import NormTuning
from peftlite.methods.oft import OFT
from peftlite.methods.prefix import PrefixTuning
from peftlite.methods.prompt import PromptTuning
from peftlite.methods.ptuning import PTuning
from peftlite.methods.scalar_head import ScalarHead
from peftlite.methods.shira import SHiRA
from peftlite.methods.sparse import SparseMask
from peftlite.methods.vblora import VBLoRA
from peftlite.methods.vera import VeRA

__all__ = [
    "BOFT", "HRA", "IA3", "LTSFT", "OFT", "AdaLoRA", "BitFit", "BottleneckAdapter", "Compacter",
    "DiffPruning", "DoRA", "FourierFT", "FullTuning", "Gated", "HiRA", "LoHa", "LoKr", "LoRA",
    "LoReFT", "NormTuning", "PTuning", "PrefixTuning", "PromptTuning", "SHiRA", "ScalarHead",
    "SparseMask", "VBLoRA", "VeRA",
]  # fmt: skip
