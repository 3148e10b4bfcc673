"""Experiments on the optimizer: convergence on real data, and its cost.

A package per command, over `workloads`, what is trained and timed, over `harness`, what any
experiment needs. pyproject.toml holds the imports to that.
"""

import os

# Before torch is loaded: threads that spin while they wait make an epoch ten times as long as soon
# as another process wants one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
