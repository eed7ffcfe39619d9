"""Commands: what the command line does, each in a function of its arguments."""

from peftlite.commands.compare import run_compare as run_compare
from peftlite.commands.data import run_validate_data as run_validate_data
from peftlite.commands.files import run_combine as run_combine
from peftlite.commands.files import run_convert as run_convert
from peftlite.commands.files import run_diff as run_diff
from peftlite.commands.files import run_extract as run_extract
from peftlite.commands.files import run_inspect as run_inspect
from peftlite.commands.files import run_merge as run_merge
from peftlite.commands.files import run_verify as run_verify
from peftlite.commands.outcome import Outcome as Outcome
from peftlite.commands.train import LossName as LossName
from peftlite.commands.train import run_train as run_train
