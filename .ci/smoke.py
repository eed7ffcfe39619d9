"""Smoke: what is installed attaches, trains, saves, loads and merges, without the repository."""

from importlib.metadata import version
from pathlib import Path

import torch

import peftlite as pl

assert pl.__version__ == version("peftlite") and not Path("peftlite").exists()
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
data = [(torch.randn(8), i % 2) for i in range(16)]
pl.attach(model, pl.LoRA(rank=2, targets="weight"), name="sql")
pl.Trainer(model, pl.losses.classification, data, epochs=1, batch_size=8, progress=False).fit()
expected = model(torch.ones(1, 8))
pl.save(pl.deltas(model)["sql"], "sql.safetensors")
pl.detach(model, "sql")
pl.load(model, "sql.safetensors")
assert torch.equal(model(torch.ones(1, 8)), expected)
pl.merge(model, "sql")
assert torch.allclose(model(torch.ones(1, 8)), expected, atol=1e-6)
