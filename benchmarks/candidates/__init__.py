"""Kernels that the package takes up once a GPU has measured that they win."""
