"""Learning from preferences: one base, and a delta for each role."""
