"""Training: the trainer, its data, losses, events and checkpoints; search; what is forgotten."""

from peftlite.train import data as data
from peftlite.train import losses as losses
from peftlite.train.continual import Forgetting as Forgetting
from peftlite.train.continual import forgetting as forgetting
from peftlite.train.events import Callback as Callback
from peftlite.train.events import TensorBoard as TensorBoard
from peftlite.train.events import WandB as WandB
from peftlite.train.history import History as History
from peftlite.train.trainer import Trainer as Trainer
from peftlite.train.trials import Trials as Trials
from peftlite.train.trials import search as search
