"""Bytes, flops, launches and time floors on GPUs: a model, not a measurement."""
