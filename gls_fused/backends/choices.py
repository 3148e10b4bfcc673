"""Whose kernels an op takes on CUDA devices that both have kernels for, and why.

Written by `python -m benchmarks roofline --choose`; docs/backends.md says from what.
"""

CHOICES: dict[str, tuple[str, str]] = {
    "precondition_rows": ("triton", "modelled: fewer launches"),
    "precondition_gradient": ("triton", "modelled: fewer launches"),
    "sketch_rows": ("triton", "modelled: fewer launches"),
    "blend_subspaces": ("triton", "modelled: fewer launches"),
    "commit_subspaces_": ("triton", "modelled: fewer launches"),
    "refresh_subspaces": ("native", "modelled: fewer launches"),
    "invert_cores": ("native", "modelled: fewer launches"),
    "update_layers_": ("triton", "modelled: fewer launches"),
    "orthogonal_updates": ("triton", "modelled: launches that take less time"),
}
