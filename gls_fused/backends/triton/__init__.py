"""Backend `triton`: the ops of gls_fused.reference as Triton kernels, for CUDA devices.

    rows.py            X P for rows and gradients, in one kernel
    sketch.py          the sums over a layer's rows, added up in a fixed order; sample.py says which
    core.py            C and lambda', all layers in one launch
    blend.py           a step's sums enter the estimates, all layers in one launch
    commit.py          the end of a gathering step, all layers in three launches
    subspace.py        the bases move: Cholesky QR, twice, all layers in five launches
    update.py          the update of all layers at once; its tables are made in update_plan.py, its
                       kernels are in update_kernels.py and, of tiles of weights, tile_kernels.py
    rounding.py        parameters of 16 bits, all of a dtype in one launch
    measure.py         root mean squares of the weights, and how much directions have grown, all
                       layers in one launch
    symmetric.py       orthogonal steps: symmetric products of all weights of one shape
    configs.py         block sizes, a table
    counting.py        how the last of a layer's programs knows that it is
    launch.py          launches, and tables of addresses

Convolutions' sketches and dense curvature are the reference's: torch's own convolutions and
products. On a CPU the kernels run in Triton's interpreter only (TRITON_INTERPRET=1), for tests.
"""

import functools

from gls_fused.backends import factors
from gls_fused.backends.triton.blend import blend_subspace, blend_subspaces
from gls_fused.backends.triton.commit import commit_subspaces_, commits
from gls_fused.backends.triton.core import invert_core, invert_cores
from gls_fused.backends.triton.measure import (
    measure_growths_,
    measure_layers_,
    measure_weights_,
)
from gls_fused.backends.triton.rounding import round_params_
from gls_fused.backends.triton.rows import precondition_gradient, precondition_rows
from gls_fused.backends.triton.sketch import sketch_rows, sum_images, sum_rows
from gls_fused.backends.triton.subspace import refresh_subspace, refresh_subspaces
from gls_fused.backends.triton.symmetric import orthogonal_updates
from gls_fused.backends.triton.update import update_layers_
from gls_fused.reference import invert_gram, sum_gram, take_patches

__all__ = [
    "TAKES_OTHERS",
    "blend_subspace",
    "blend_subspaces",
    "commit_subspaces_",
    "commits",
    "invert_core",
    "invert_cores",
    "invert_gram",
    "measure_growths_",
    "measure_layers_",
    "measure_weights_",
    "orthogonal_updates",
    "precondition_gradient",
    "precondition_rows",
    "refresh_subspace",
    "refresh_subspaces",
    "round_params_",
    "sketch_rows",
    "sum_gram",
    "sum_images",
    "sum_rows",
    "take_patches",
    "update_layers_",
    "update_spectral_layers_",
]

# Whether `update_layers_` also takes the parameters that no layer owns.
TAKES_OTHERS = True

update_spectral_layers_ = functools.partial(
    factors.update_spectral_layers_, precondition_gradient, orthogonal_updates
)
