#!/usr/bin/env bash
# Everything that wants a GPU, in one command: the kernels' tests for real, compute-sanitizer where
# it is installed, then the benchmarks, whose CSV files are written to benchmarks/results/.
#
#   bash benchmarks/gpu.sh [--quick]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python -c 'import torch; assert torch.cuda.is_available(), "there is no GPU"'
tests=(tests/kernels/interpreted{,_beside,_packed,_rows}.py)

echo "== tests"
python -m pytest -q -n 0 tests/kernels

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
        echo "== compute-sanitizer $tool"
        # memory that torch keeps for itself hides what is read beyond an end
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            python -m pytest -q -n 0 -k "not graph" "${tests[@]}"
    done
else
    echo "== compute-sanitizer isn't installed: left out"
fi

echo "== primitives"
python benchmarks/primitives.py "$@"
for script in lora_linear block memory bank; do
    if [[ -f benchmarks/$script.py ]]; then
        echo "== $script"
        python "benchmarks/$script.py" --device cuda "$@"
    fi
done
