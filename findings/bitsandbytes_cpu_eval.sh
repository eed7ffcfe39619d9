#!/usr/bin/env bash
# bitsandbytes 0.50.2: on a CPU with AVX512-BF16, one forward pass in eval mode changes what a 4-bit
# layer's state dict holds: the scales are rounded to bf16, and about a fifth of the weights that they
# stand for are others. A checkpoint saved after an evaluation isn't the one saved before it.
# A CPU without AVX512-BF16 doesn't show it: the script says so, and fails.
#
# Seen with bitsandbytes 0.50.2, torch 2.13.0 on Python 3.11, Intel Xeon:
#   changed: 0.weight.absmax 0.weight.nested_absmax 0.weight.quant_state.bitsandbytes__nf4
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
grep -q avx512_bf16 /proc/cpuinfo || { echo "this CPU has no AVX512-BF16"; exit 1; }
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy packaging
"$folder/venv/bin/pip" install -q --no-deps bitsandbytes==0.50.2
cat > "$folder/show.py" <<'PYTHON'
import torch
from bitsandbytes.nn import Linear4bit

torch.manual_seed(0)
bf16 = torch.bfloat16
layer = Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=bf16)
model = torch.nn.Sequential(layer).to("cpu")


def held():
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


x, before = torch.randn(4, 64, dtype=bf16), held()
model.train()
model(x)
assert all(torch.equal(before[key], tensor) for key, tensor in held().items())
with torch.no_grad():
    model.eval()(x)
changed = [key for key, tensor in held().items() if not torch.equal(before[key], tensor)]
print("changed:", *changed)
assert changed, "an eval pass now leaves the state dict as it was"
PYTHON
"$folder/venv/bin/python" "$folder/show.py" 2>/dev/null
