"""Packed weights: formats of four and eight bits, modules that keep them, and their products."""
