"""Training: the loop, its losses, events and checkpoints; the data is in `peftlite.train.data`."""

from peftlite.train.events import Callback as Callback
from peftlite.train.events import TensorBoard as TensorBoard
from peftlite.train.events import WandB as WandB
from peftlite.train.history import History as History
from peftlite.train.trainer import Trainer as Trainer
