"""peftlite: parameter-efficient fine-tuning that attaches to any torch module."""

from peftlite.attach import attach as attach
from peftlite.attach import deltas as deltas
from peftlite.attach import detach as detach
from peftlite.delta import Delta as Delta
from peftlite.errors import BaseMismatchError as BaseMismatchError
from peftlite.errors import FileError as FileError
from peftlite.errors import PeftliteError as PeftliteError
from peftlite.errors import TargetError as TargetError
from peftlite.io import Info as Info
from peftlite.io import inspect as inspect
from peftlite.io import load as load
from peftlite.io import save as save
from peftlite.merge import Receipt as Receipt
from peftlite.merge import merge as merge
from peftlite.merge import unmerge as unmerge
from peftlite.methods import BitFit as BitFit
from peftlite.methods import FullTuning as FullTuning
from peftlite.methods import LoRA as LoRA
from peftlite.patch import Method as Method
from peftlite.patch import Patch as Patch
from peftlite.plan import Plan as Plan
from peftlite.plan import plan as plan
from peftlite.site import Site as Site
from peftlite.use import use as use
from peftlite.use import using as using
from peftlite.use import view as view
