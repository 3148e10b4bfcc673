"""Kernels on a GPU: `python -m benchmarks.device`, which device_check.sh runs."""
