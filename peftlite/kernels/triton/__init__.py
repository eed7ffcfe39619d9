"""The GPU's side of the fast paths, in Triton."""
