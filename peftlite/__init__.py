"""peftlite: parameter-efficient fine-tuning that attaches to any torch module."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from peftlite import kernels as kernels
from peftlite.core.attach import attach as attach
from peftlite.core.attach import deltas as deltas
from peftlite.core.attach import detach as detach
from peftlite.core.delta import Delta as Delta
from peftlite.core.patch import Method as Method
from peftlite.core.patch import Patch as Patch
from peftlite.core.site import Site as Site
from peftlite.errors import BaseMismatchError as BaseMismatchError
from peftlite.errors import FileError as FileError
from peftlite.errors import PeftliteError as PeftliteError
from peftlite.errors import TargetError as TargetError
from peftlite.io.content import Info as Info
from peftlite.io.export import export as export
from peftlite.io.load import inspect as inspect
from peftlite.io.load import load as load
from peftlite.io.merge_files import merge_files as merge_files
from peftlite.io.native import save as save
from peftlite.io.peft.writing import check_vllm as check_vllm
from peftlite.methods import BOFT as BOFT
from peftlite.methods import HRA as HRA
from peftlite.methods import IA3 as IA3
from peftlite.methods import LTSFT as LTSFT
from peftlite.methods import OFT as OFT
from peftlite.methods import AdaLoRA as AdaLoRA
from peftlite.methods import BitFit as BitFit
from peftlite.methods import BottleneckAdapter as BottleneckAdapter
from peftlite.methods import Compacter as Compacter
from peftlite.methods import DiffPruning as DiffPruning
from peftlite.methods import DoRA as DoRA
from peftlite.methods import FourierFT as FourierFT
from peftlite.methods import FullTuning as FullTuning
from peftlite.methods import Gated as Gated
from peftlite.methods import LoHa as LoHa
from peftlite.methods import LoKr as LoKr
from peftlite.methods import LoRA as LoRA
from peftlite.methods import LoReFT as LoReFT
from peftlite.methods import NormTuning as NormTuning
from peftlite.methods import PrefixTuning as PrefixTuning
from peftlite.methods import PromptTuning as PromptTuning
from peftlite.methods import PTuning as PTuning
from peftlite.methods import SHiRA as SHiRA
from peftlite.methods import SparseMask as SparseMask
from peftlite.methods import VBLoRA as VBLoRA
from peftlite.methods import VeRA as VeRA
from peftlite.methods import fish_scores as fish_scores
from peftlite.verbs.combine import combine as combine
from peftlite.verbs.combine import rescale as rescale
from peftlite.verbs.combine import resize_rank as resize_rank
from peftlite.verbs.extract import extract as extract
from peftlite.verbs.fuse import Fused as Fused
from peftlite.verbs.fuse import fuse as fuse
from peftlite.verbs.fuse import unfuse as unfuse
from peftlite.verbs.initialize import initialize as initialize
from peftlite.verbs.merge import Receipt as Receipt
from peftlite.verbs.merge import merge as merge
from peftlite.verbs.merge import unmerge as unmerge
from peftlite.verbs.plan import Plan as Plan
from peftlite.verbs.plan import plan as plan
from peftlite.verbs.use import use as use
from peftlite.verbs.use import using as using
from peftlite.verbs.use import view as view
from peftlite.version import __version__ as __version__

if _TYPE_CHECKING:
    from peftlite.bank import DeltaBank as DeltaBank
    from peftlite.train import Forgetting as Forgetting
    from peftlite.train import History as History
    from peftlite.train import TensorBoard as TensorBoard
    from peftlite.train import Trainer as Trainer
    from peftlite.train import Trials as Trials
    from peftlite.train import WandB as WandB
    from peftlite.train import data as data
    from peftlite.train import forgetting as forgetting
    from peftlite.train import losses as losses
    from peftlite.train import search as search

_OF_TRAIN = {
    "Forgetting", "History", "TensorBoard", "Trainer", "Trials", "WandB", "data", "forgetting",
    "losses", "search", "train",
}  # fmt: skip
_OF_BANK = {"DeltaBank", "bank"}


def __getattr__(name: str) -> object:
    # who neither trains nor serves with them imports neither the trainer nor the bank
    if name in _OF_TRAIN:
        import peftlite.train as home
    elif name in _OF_BANK:
        import peftlite.bank as home
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return home if home.__name__.endswith(f".{name}") else getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OF_TRAIN, *_OF_BANK})
