"""The errors of each part of the library: what a stranger does, and what it says."""
