"""Seconds of a training step of published models, with GLS and with fused AdamW."""
