#!/usr/bin/env bash
# adapters 1.3.0: LoReFT at the first positions of a prompt counts positions from the first of each call.
# With a KV cache every decoded token is a call of its own, so it is changed as if it were a first one:
# the logits of a cached step are not those of the whole sequence at once, as they are without ReFT.
#
# Seen with adapters 1.3.0, torch 2.13.0, transformers 4.57.6 on Python 3.11:
#   base 1.5e-08, with LoReFT at the first 3 positions 0.24
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==4.57.6 adapters==1.3.0
cat > "$folder/show.py" <<'PYTHON'
import adapters
import torch
from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
config = GPT2Config(
    vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
)
model = GPT2LMHeadModel(config).eval()
adapters.init(model)
ids = torch.randint(1, 50, (1, 8))


@torch.no_grad()
def apart():
    """How far the last logits are apart with a cache for all but the last token, and without."""
    begun = model(ids[:, :-1], use_cache=True)
    step = model(ids[:, -1:], past_key_values=begun.past_key_values)
    return (step.logits[:, -1] - model(ids).logits[:, -1]).abs().max().item()


plain = apart()
model.add_adapter("a", config=adapters.LoReftConfig(r=4, prefix_positions=3, suffix_positions=0))
model.set_active_adapters("a")
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "reft" in name and "orth" not in name:
            parameter.normal_()
tuned = apart()
print(f"base {plain:.2g}, with LoReFT at the first 3 positions {tuned:.2g}")
assert plain < 1e-5
assert tuned > 1e-2, "a cached step now counts its positions from the prompt's first"
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
