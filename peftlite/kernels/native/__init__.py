"""Native kernels: C that the machine's own compiler builds when it is first wanted, if it can."""
