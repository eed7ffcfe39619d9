"""Training: the trainer, its data, losses, events and checkpoints; search; what is forgotten."""

from peftlite.train import data, losses
from peftlite.train.continual import Forgetting, forgetting
from peftlite.train.events import Callback, TensorBoard, WandB
from peftlite.train.history import History
from peftlite.train.preference.kept import keep_reference
from peftlite.train.preference.online import GRPO, PPO, best_of
from peftlite.train.settings import Training
from peftlite.train.together.jobs import fit_together
from peftlite.train.together.service import Client, Service
from peftlite.train.trainer import Trainer
from peftlite.train.trials import Trial, Trials, search

__all__ = [
    "GRPO", "PPO", "Callback", "Client", "Forgetting", "History", "Service", "TensorBoard",
    "Trainer", "Training", "Trial", "Trials", "WandB", "best_of", "data", "fit_together",
    "forgetting", "keep_reference", "losses", "search",
]  # fmt: skip
