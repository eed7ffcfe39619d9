"""The public names but the trainer's and the bank's, each from its home."""

import peftlite.compat as compat
import peftlite.kernels as kernels
import peftlite.methods as methods
import peftlite.plot as plot
from peftlite.core.attach import attach, deltas, detach
from peftlite.core.delta import Delta
from peftlite.core.patch import Method, Patch
from peftlite.core.site import Site
from peftlite.errors import BaseMismatchError, FileError, PeftliteError, TargetError
from peftlite.io.content import Info
from peftlite.io.export import export
from peftlite.io.load import inspect, load
from peftlite.io.merge_files import merge_files
from peftlite.io.native import save
from peftlite.io.peft.vllm import check_vllm
from peftlite.io.push import push
from peftlite.io.quantize_files import quantize_files
from peftlite.methods import catalog
from peftlite.methods.catalog import *  # noqa: F403
from peftlite.methods.fish import fish_scores
from peftlite.verbs.combine import combine, rescale, resize_rank
from peftlite.verbs.extract import extract
from peftlite.verbs.fuse import Fused, fuse, unfuse
from peftlite.verbs.initialize import initialize
from peftlite.verbs.merge import Receipt, merge, unmerge
from peftlite.verbs.plan import Plan, plan
from peftlite.verbs.quantize import Packs, dequantize, quantize
from peftlite.verbs.use import use, using, view

__all__ = [
    "BaseMismatchError", "Delta", "FileError", "Fused", "Info", "Method", "Packs", "Patch",
    "PeftliteError", "Plan", "Receipt", "Site", "TargetError", "attach", "check_vllm",
    "combine", "compat", "deltas", "dequantize", "detach", "export", "extract", "fish_scores",
    "fuse", "initialize", "inspect", "kernels", "load", "merge", "merge_files", "methods", "plan",
    "plot", "push", "quantize", "quantize_files", "rescale", "resize_rank", "save", "unfuse",
    "unmerge", "use", "using", "view",
]  # fmt: skip
__all__ += catalog.__all__
