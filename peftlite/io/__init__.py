"""Deltas on disk: peftlite's files, its peers', and checkpoints merged without their model."""
