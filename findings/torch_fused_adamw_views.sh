#!/usr/bin/env bash
# torch 2.13.0: AdamW(fused=True) on a CPU takes the numbers of a parameter, of its gradient and of its
# moments in the order in which they lie in memory. Adapters whose B is a view of a buffer for a larger
# rank, buffer[:, :rank], then learn other values than by the plain AdamW, and numbers of the buffer
# beside the view change. The same goes for a parameter that lies by columns after load_state_dict,
# which gives it moments that lie by rows. Nothing is raised or warned of.
#
# Seen with torch 2.13.0 on Python 3.11:
#   a view of the first 4 of 6 columns: 0.4934 from the plain AdamW; 12 numbers beside it changed
#   by columns: 0.0000 from it; after load_state_dict 0.2755
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import torch
from torch import nn


def tuned(b: torch.Tensor, fused: bool, again: bool) -> nn.Parameter:
    """B after 4 steps of AdamW, which may be made anew from its state after 2."""
    parameter = nn.Parameter(b)
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    for step in range(4):
        if step == 2 and again:
            state = optimizer.state_dict()
            moments = state["state"][0]
            state["state"][0] = {k: v.clone(memory_format=torch.contiguous_format) for k, v in moments.items()}
            optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
            optimizer.load_state_dict(state)  # as from a file, which has rows
        x = torch.arange(10.0).view(10, 1).sin() + torch.arange(4.0).cos()
        ((parameter * x).sum(1) - step).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameter.detach()


def apart(b: torch.Tensor, again: bool = False) -> float:
    plain = tuned(torch.zeros(10, 4), fused=False, again=again)
    return (tuned(b, fused=True, again=again) - plain).abs().max().item()


buffer = torch.zeros(10, 6)
view = apart(buffer[:, :4])
beside = int((buffer[:, 4:] != 0).sum())
print(f"a view of the first 4 of 6 columns: {view:.4f} from the plain AdamW; {beside} numbers beside it changed")
first, later = apart(torch.zeros(4, 10).t()), apart(torch.zeros(4, 10).t(), again=True)
print(f"by columns: {first:.4f} from it; after load_state_dict {later:.4f}")
assert view > 0.01 and beside > 0, "a view now learns what it should"
assert first < 1e-5 and later > 0.01, "moments now lie as their parameter does"
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
