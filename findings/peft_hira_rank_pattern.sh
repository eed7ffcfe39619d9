#!/usr/bin/env bash
# peft 0.21.2: HiraConfig documents `rank_pattern` ("the mapping from layer names to ranks which are
# different from the default r"), and nothing refuses it; but every layer that HiRA wraps for the
# first time takes `r`, so the pattern does nothing. LoraConfig's works as documented. The shapes in
# the saved file are those of r, and the saved adapter_config.json still states the pattern.
#
# Seen with peft 0.21.2, torch 2.13.0, transformers 4.57.6 on Python 3.11:
#   lora {'first': 2, 'second': 5}
#   hira {'first': 2, 'second': 2}
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==4.57.6 peft==0.21.2
cat > "$folder/show.py" <<'PYTHON'
import peft
from torch import nn


def model():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def ranks(config, name):
    tuned = peft.get_peft_model(model(), config)
    found = [p.shape[0] for key, p in tuned.named_parameters() if name in key]
    return dict(zip(("first", "second"), found, strict=True))


common = {"r": 2, "target_modules": ["0", "2"], "rank_pattern": {"2": 5}}
lora = ranks(peft.LoraConfig(**common), "lora_A")
hira = ranks(peft.HiraConfig(**common), "hira_A")
print("lora", lora)
print("hira", hira)
assert peft.__version__ == "0.21.2"
assert lora == {"first": 2, "second": 5}
assert hira == {"first": 2, "second": 2}, "the pattern has an effect now"
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
