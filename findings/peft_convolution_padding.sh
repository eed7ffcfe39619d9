#!/usr/bin/env bash
# peft 0.21.2: a LoRA on a convolution with padding_mode="reflect" (or "circular", "replicate") pads the
# input of its own convolution with zeros while it runs. merge_and_unload adds its change to the weight,
# which the base pads as it says: the merged model is another one at the edges than the one trained.
#
# Seen with peft 0.21.2, torch 2.13.0, transformers 4.57.6 on Python 3.11:
#   zeros: running and merged are apart by 4.8e-07, away from the edge by 3e-07
#   reflect: running and merged are apart by 2.1, away from the edge by 7.2e-07
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==4.57.6 peft==0.21.2
cat > "$folder/show.py" <<'PYTHON'
import peft
import torch
from torch import nn

torch.manual_seed(0)
x = torch.randn(1, 3, 6, 6)
for mode in ("zeros", "reflect"):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode))
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        running = tuned(x)
        merged = tuned.merge_and_unload()(x)
    apart = (running - merged).abs()
    edge, inner = apart.max().item(), apart[..., 1:-1, 1:-1].max().item()
    print(f"{mode}: running and merged are apart by {edge:.2g}, away from the edge by {inner:.2g}")
    assert inner < 1e-5
    assert (edge > 1e-2) is (mode == "reflect"), "the padding is the base's now"
assert peft.__version__ == "0.21.2"
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
