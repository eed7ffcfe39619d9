#!/usr/bin/env bash
# bitsandbytes 0.50.2: on a CPU, the 8-bit code of a number is not always that of the nearest value.
# It is looked up in a table of 65,536 even steps from -1 to 1, so a number between the middle of two
# values and the middle of its step is given to the farther of them. The scales of a 4-bit tensor are
# such codes, so an implementation that rounds to the nearest doesn't give its bytes.
#
# Seen with bitsandbytes 0.50.2, torch 2.13.0 on Python 3.11:
#   99 of 102400 codes aren't the nearest; 1 isn't the one of its step
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy packaging
"$folder/venv/bin/pip" install -q --no-deps bitsandbytes==0.50.2
cat > "$folder/show.py" <<'PYTHON'
import torch
from bitsandbytes.functional import create_dynamic_map, quantize_blockwise

torch.manual_seed(0)
values = create_dynamic_map()
middles = (values[1:] + values[:-1]) / 2
x = torch.rand(256 * 400) - 0.5
codes, state = quantize_blockwise(x, blocksize=256)
y = (x.view(-1, 256) / state.absmax[:, None]).flatten()
step = ((y + 1) * 32767.5 + 0.5).floor() / 32767.5 - 1
apart = [(torch.bucketize(z, middles) != codes).sum().item() for z in (y, step)]
print(f"{apart[0]} of {len(x)} codes aren't the nearest; {apart[1]} isn't the one of its step")
assert apart[0] > 20, "codes are now those of the nearest values"
assert apart[1] < 5
PYTHON
"$folder/venv/bin/python" "$folder/show.py" 2>/dev/null
