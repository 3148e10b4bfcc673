"""Seconds of the host in `step()`, over the number of layers."""
