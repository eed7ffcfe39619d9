#!/usr/bin/env bash
# What wants a GPU, as three commands in order of worth, each of four minutes at most. What was measured when
# its time is up is written to benchmarks/results/.
#
#   bash benchmarks/gpu.sh 1   the kernels' tests for real; a LoRA linear at Llama 8B's shapes
#   bash benchmarks/gpu.sh 2   the kernels by themselves; a Llama block and a small Llama
#   bash benchmarks/gpu.sh 3   the bank's decode; compute-sanitizer on the kernels' tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python -c 'import torch; assert torch.cuda.is_available(), "there is no GPU"'
tests=(tests/kernels/interpreted{,_beside,_packed,_rows}.py)

within() { # seconds, then what may be ended after them
    local seconds=$1
    shift
    echo "== $* (${seconds} s)"
    timeout --kill-after=10 "$seconds" "$@" || [[ $? == 124 ]]
}

case ${1-} in
1)
    within 80 python -m pytest -q -n 0 "${tests[@]}"
    within 150 python benchmarks/lora_linear.py --device cuda --eager --ranks 16 --tokens 8192 2048 --seconds 3
    ;;
2)
    within 90 python benchmarks/primitives.py
    within 140 python benchmarks/block.py --device cuda --rounds 5
    ;;
3)
    within 120 python benchmarks/bank.py --device cuda --rounds 7
    if command -v compute-sanitizer >/dev/null; then
        # memory that torch keeps for itself hides what is read beyond an end
        export PYTORCH_NO_CUDA_MEMORY_CACHING=1
        for tool in memcheck racecheck; do
            within 50 compute-sanitizer --tool "$tool" --error-exitcode 1 \
                python -m pytest -q -n 0 -x -k "not graph" "${tests[@]:0:1}"
        done
    else
        echo "== compute-sanitizer isn't installed: left out"
    fi
    ;;
*)
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac
