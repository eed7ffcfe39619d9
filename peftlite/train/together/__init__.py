"""Together: many fine-tunes at once on one base, whose calls of the model run as one."""
