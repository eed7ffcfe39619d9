"""What is done to a model and its deltas, beside attaching and detaching."""
