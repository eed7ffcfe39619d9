"""Trust: trials of what must survive, of any size; `benchmarks/trust.py` prints their figures."""
