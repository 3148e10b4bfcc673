"""Implementations of the ops of gls_fused.reference, with the same names and signatures."""
