"""The core: a class swapped, so that patches change what a module reads and computes."""
