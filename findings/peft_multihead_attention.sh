#!/usr/bin/env bash
# peft 0.21.2: a LoRA on an nn.MultiheadAttention changes its output map, out_proj, by twice the s·BA that
# get_delta_weight gives for it, while it runs and once it is merged; in_proj_weight is changed once. So
# what trains is consistent with itself, and the tensors in the file mean twice what their formula says.
#
# Seen with peft 0.21.2, torch 2.13.0, transformers 4.57.6 on Python 3.11:
#   running: from the change once 0.27, from the change twice 6e-08
#   merged: from the change once 0.27, from the change twice 6e-08
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==4.57.6 peft==0.21.2
cat > "$folder/show.py" <<'PYTHON'
import copy

import peft
import torch
from torch import nn

torch.manual_seed(0)
attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
base, x = copy.deepcopy(attention), torch.randn(1, 5, 8)
config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["attention"], init_lora_weights=False)
tuned = peft.get_peft_model(nn.ModuleDict({"attention": attention}), config).eval()
layer = tuned.base_model.model["attention"]
change = layer.base_layer.out_proj.get_delta_weight("default")
inside = layer.get_delta_weight("default")


def by_hand(times):
    twin = copy.deepcopy(base)
    with torch.no_grad():
        twin.in_proj_weight += inside
        twin.out_proj.weight += times * change
        return twin(x, x, x)[0]


with torch.no_grad():
    running = layer(x, x, x)[0]
    merged = tuned.merge_and_unload()["attention"](x, x, x)[0]
for name, y in (("running", running), ("merged", merged)):
    once, twice = ((y - by_hand(times)).abs().max().item() for times in (1, 2))
    print(f"{name}: from the change once {once:.2g}, from the change twice {twice:.2g}")
    assert once > 1e-2 and twice < 1e-5, "the change is no longer applied twice"
assert peft.__version__ == "0.21.2"
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
