"""Experiments on the optimizer: convergence on real data, and its cost."""
