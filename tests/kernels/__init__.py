"""Tests of the kernels: every fast path against the reference in fp64, with the gradient named."""
