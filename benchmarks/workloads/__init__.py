"""What is trained and timed: tasks, data, optimizers, and GLS's check against its reference."""
