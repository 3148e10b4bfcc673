"""Training and validation losses of tasks x optimizers x seeds, and the demonstration."""
