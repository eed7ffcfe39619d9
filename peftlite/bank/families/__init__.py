"""How a bank changes each row by its own delta: one file for each family of methods."""
