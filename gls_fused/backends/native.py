"""Backend `native`: the C++ and CUDA ops of csrc/. Importing this module loads them.

Ops that are a single call into torch's own kernels, and dense curvature, which is the oracle, are
the reference's; on CUDA also bases that move, and cores, beyond the ranks that have kernels.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

try:
    from gls_fused import _build_info
except ImportError as error:
    raise ImportError(
        "not built: this is a source tree; run `pip install --no-build-isolation -e .` in it"
    ) from error
from gls_fused import reference
from gls_fused.backends import cpu_factors
from gls_fused.backends.cpu_factors import orthogonal_updates
from gls_fused.reference import (
    DenseInverse,
    Inverse,
    Normalize,
    Window,
    blend_subspace,
    count_patches,
    invert_gram,
    sum_gram,
)

__all__ = [
    "TAKES_OTHERS",
    "LinearCapture",
    "add_sketch_",
    "blend_subspace",
    "blend_subspaces",
    "captured_linear",
    "commit_subspaces_",
    "commits",
    "invert_core",
    "invert_cores",
    "invert_gram",
    "measure_growths_",
    "measure_weights_",
    "orthogonal_updates",
    "precondition_gradient",
    "precondition_rows",
    "refresh_subspace",
    "refresh_subspaces",
    "round_params_",
    "sketch_rows",
    "sum_gram",
    "take_patches",
    "update_layers_",
    "update_spectral_layers_",
]


def _load() -> str:
    """Load the schema, then the CPU kernels compiled for what torch found of this CPU: its name."""
    if _build_info.native_failure is not None:
        raise ImportError(_build_info.native_failure)
    running = torch.__version__.split("+")[0]
    if running != _build_info.torch_version:
        raise ImportError(
            f"it was built against torch {_build_info.torch_version}, and {running} is running; "
            f"install gls_fused's wheel for torch {running}, or build it with --no-build-isolation"
        )
    from gls_fused import _C

    folder = Path(_C.__file__).parent
    names = (torch.backends.cpu.get_cpu_capability(), "DEFAULT")
    found = [(path, name) for name in names for path in folder.glob(f"_cpu_{name.lower()}.*")]
    if not found:
        raise ImportError(f"no library _cpu_{names[0].lower()} beside {_C.__file__}")
    path, capability = found[0]
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    return capability


def _load_cuda() -> str | None:
    """Load the CUDA kernels: why there are none, or None."""
    if _build_info.cuda_failure is not None:
        return _build_info.cuda_failure
    from gls_fused import _C

    found = list(Path(_C.__file__).parent.glob("_cuda.*"))
    if not found:
        return f"no library _cuda beside {_C.__file__}"
    try:
        torch.ops.load_library(str(found[0]))  # type: ignore[no-untyped-call]
    except OSError as error:
        # As where this torch is one without CUDA.
        return f"{error}; this is torch {torch.__version__}, install one for CUDA"
    return None


cpu_capability = _load()
# Why there are no CUDA kernels, or None.
cuda_failure = _load_cuda()

# They exist once the extension is loaded.
from gls_fused._C import LinearCapture, captured_linear  # noqa: E402

_ops = torch.ops.gls_fused

# See `gls_fused.backends.triton`; torch's op wakes its threads anew for each of these parameters.
TAKES_OTHERS = True

# Ranks with CUDA kernels, by dtype: kMaxRank of csrc/cuda/product.h, kMaxCoreRank of core.h, and
# kMaxRootRank there where the power is not 1.
CUDA_BASIS_RANKS = {torch.float32: 64}
CUDA_CORE_RANKS = {torch.float32: 128, torch.float64: 88}
CUDA_ROOT_RANKS = {torch.float32: 88, torch.float64: 60}


def precondition_rows(
    rows: Tensor, inverse: Inverse, *, ones: bool
) -> tuple[Tensor, Tensor | None]:
    """See `gls_fused.reference.precondition_rows`."""
    if isinstance(inverse, DenseInverse):
        return reference.precondition_rows(rows, inverse, ones=ones)
    product, last = _ops.precondition_rows(rows, *inverse, ones)
    return product, last if ones else None


def precondition_gradient(
    weight_gradient: Tensor, bias_gradient: Tensor | None, inverse: Inverse
) -> tuple[Tensor, Tensor | None]:
    """See `gls_fused.reference.precondition_gradient`."""
    if isinstance(inverse, DenseInverse):
        return reference.precondition_gradient(weight_gradient, bias_gradient, inverse)
    product, last = _ops.precondition_gradient(weight_gradient, bias_gradient, *inverse)
    return product, None if bias_gradient is None else last


def take_patches(
    images: Tensor, window: Window, places: Tensor | None = None, groups: int = 1
) -> Tensor:
    """See `gls_fused.reference.take_patches`."""
    if not images.is_cpu:
        return reference.take_patches(images, window, places, groups)
    if places is None:
        places = torch.arange(math.prod(count_patches(images, window, groups)))
    return _ops.take_patches(images, *window, groups, places)  # type: ignore[no-any-return]


def sketch_rows(rows: Tensor, basis: Tensor, *, ones: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `gls_fused.reference.sketch_rows`."""
    core, sketch, trace = _ops.sketch_rows(rows, basis, ones)
    return core, sketch, trace


def add_sketch_(rows: Tensor, basis: Tensor, ones: bool, sums: Tensor) -> None:
    """Add n, ||A||_F^2 and `sketch_rows` to sums as `gls_fused.reference.split_sums` has them."""
    _ops.add_sketch_(rows, basis, ones, sums)


def blend_subspaces(
    bases: Sequence[Tensor],
    cores: Sequence[Tensor],
    traces: Sequence[Tensor],
    samples: Sequence[Tensor],
    sums: Sequence[Tensor],
    beta: float,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """See `gls_fused.reference.blend_subspaces`; with kernels on the CPU, Z is kept by columns."""
    estimates = (bases, cores, traces, samples, sums)
    if not bases or not all(basis.is_cpu for basis in bases):
        return reference.blend_subspaces(*estimates, beta)
    return list(zip(*_ops.blend_subspaces(*estimates, beta), strict=True))


def refresh_subspace(core: Tensor, sketch: Tensor) -> tuple[Tensor, Tensor]:
    """See `gls_fused.reference.refresh_subspace`."""
    (result,) = refresh_subspaces([core], [sketch])
    return result


def refresh_subspaces(
    cores: Sequence[Tensor], sketches: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """See `gls_fused.reference.refresh_subspaces`."""
    fused, plain = _ops.refresh_subspaces, reference.refresh_subspace
    return _by_layer(fused, plain, CUDA_BASIS_RANKS, cores, sketches)


def invert_core(
    core: Tensor,
    trace: Tensor,
    dim: int,
    damping: float,
    power: float = 1,
    samples: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `gls_fused.reference.invert_core`."""
    rows = None if samples is None else [samples]
    (result,) = invert_cores([core], [trace], [dim], damping, power, rows)
    return result


def invert_cores(
    cores: Sequence[Tensor],
    traces: Sequence[Tensor],
    dims: Sequence[int],
    damping: float,
    power: float = 1,
    samples: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """See `gls_fused.reference.invert_cores`."""

    def fused(cores: Any, traces: Any, dims: Any, *rows: Any) -> Any:
        return _ops.invert_cores(cores, traces, dims, damping, power, *(rows or [[]]))

    def plain(core: Tensor, trace: Tensor, dim: int, rows: Tensor | None = None) -> Any:
        return reference.invert_core(core, trace, dim, damping, power, rows)

    ranks = CUDA_CORE_RANKS if power == 1 else CUDA_ROOT_RANKS
    parts = [traces, dims] if samples is None else [traces, dims, samples]
    return _by_layer(fused, plain, ranks, cores, *parts)


def commits(estimate: Sequence[Tensor]) -> bool:
    """Whether `commit_subspaces_` takes an estimate (U, M, t, s, C, lambda'^p): on a CPU, of one
    dtype, float32 or float64, as `empty_state` lays it out.
    """
    basis, *rest = estimate
    dtype = basis.dtype
    if not basis.is_cpu or dtype not in (torch.float32, torch.float64):
        return False
    alike = all(part.dtype is dtype and part.is_contiguous() for part in rest)
    return alike and basis.T.is_contiguous()


def commit_subspaces_(
    estimates: Sequence[Sequence[Tensor]],
    sums: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
    *,
    beta: float,
    damping: float,
    power: float,
    skip: Tensor | None = None,
) -> None:
    """See `gls_fused.backends.triton.commit.commit_subspaces_`."""
    if skip is not None and skip:
        return
    counts = [len(mine) for mine in gradients]
    flat = list(itertools.chain.from_iterable(gradients))
    parts = list(zip(*estimates, strict=True))
    _ops.commit_subspaces_(*parts, sums, flat, counts, beta, damping, power)


def update_layers_(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    inverses: Sequence[Inverse | None],
    *,
    layer_sizes: Sequence[int],
    normalize: Normalize,
    lr: float | Tensor,
    momentum: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    skip: Tensor | None = None,
    rates: Tensor | None = None,
) -> None:
    """See `gls_fused.reference.update_layers_`."""
    some = inverses.count(None) < len(inverses)
    if some and any(isinstance(inverse, DenseInverse) for inverse in inverses):
        reference.update_layers_(
            params, gradients, exp_avgs, exp_avg_sqs, steps, inverses, layer_sizes=layer_sizes,
            normalize=normalize, lr=lr, momentum=momentum, beta2=beta2, eps=eps,
            weight_decay=weight_decay, skip=skip, rates=rates,
        )  # fmt: skip
        return
    parts: Any = (inverses,) * 3
    if some:
        parts = zip(*(inverse or (None, None, None) for inverse in inverses), strict=True)
    if isinstance(lr, Tensor) and lr.dtype not in (torch.float32, torch.float64):
        lr = lr.double()
    _ops.update_layers_(
        params,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        steps,
        *(list(part) for part in parts),
        layer_sizes,
        normalize,
        0.0 if isinstance(lr, Tensor) else lr,
        momentum,
        beta2,
        eps,
        weight_decay,
        lr if isinstance(lr, Tensor) else None,
        None,
        None if skip is None else skip.float(),
        rates,
    )


def measure_weights_(
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
    least: Sequence[float],
    skip: Tensor | None = None,
) -> None:
    """See `gls_fused.reference.measure_weights_`; on CUDA a few of torch's ops for all."""
    if not weights:
        return
    if all(weight.is_cpu for weight in weights):
        if skip is None or not skip:
            _ops.measure_weights_(weights, results, least)
        return
    alike: dict[torch.dtype, list[int]] = {}
    for index, result in enumerate(results):
        alike.setdefault(result.dtype, []).append(index)
    for dtype, mine in alike.items():
        found = list(torch._foreach_norm([weights[i] for i in mine], 2, dtype))
        kept = [results[i] for i in mine]
        torch._foreach_div_(found, [max(1, weights[i].numel()) ** 0.5 for i in mine])
        torch._foreach_clamp_min_(found, [least[i] for i in mine])
        if skip is not None:
            found = [torch.where(skip, *pair) for pair in zip(kept, found, strict=True)]
        torch._foreach_copy_(kept, found)


def measure_growths_(
    squares: Sequence[Tensor],
    growths: Sequence[Tensor],
    slows: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    beta2: float,
    every: int,
    most: float,
    skip: Tensor | None = None,
) -> None:
    """See `gls_fused.reference.measure_growths_`, which is what runs on CUDA."""
    if not squares[0].is_cpu:
        reference.measure_growths_(
            squares, growths, slows, steps, beta2=beta2, every=every, most=most, skip=skip
        )
    elif skip is None or not skip:
        _ops.measure_growths_(squares, growths, slows, steps, beta2, every, most)


def round_params_(
    params: Sequence[Tensor],
    values: Sequence[Tensor],
    seeds: Sequence[int],
    steps: Sequence[Tensor],
) -> None:
    """See `gls_fused.reference.round_params_`; parameters of one dtype and device."""
    if not params:
        return
    _ops.round_params_(params, values, seeds, steps)
    increment_version(list(params))


update_spectral_layers_ = functools.partial(
    cpu_factors.update_spectral_layers_, precondition_gradient
)


def _by_layer(
    fused: Callable[..., Any],
    plain: Callable[..., tuple[Tensor, Tensor]],
    cuda_ranks: Mapping[torch.dtype, int],
    cores: Sequence[Tensor],
    *parts: Sequence[Any],
) -> list[tuple[Tensor, Tensor]]:
    """Two results per layer: `fused` gives those of all that are alike in dtype and device at once.

    Args:
        plain: for a layer on CUDA whose core has no kernel.
        cuda_ranks: the largest rank with kernels on CUDA, by dtype.
        cores, parts: the arguments, of each layer one.
    """
    results: list[Any] = [None] * len(cores)
    calls: dict[tuple[torch.dtype, int], list[int]] = {}
    for index, layer in enumerate(zip(cores, *parts, strict=True)):
        core = layer[0]
        if core.is_cuda and len(core) > cuda_ranks.get(core.dtype, -1):
            results[index] = plain(*layer)
        else:
            calls.setdefault((core.dtype, core.get_device()), []).append(index)
    for mine in calls.values():
        found = fused(*([part[index] for index in mine] for part in (cores, *parts)))
        for index, result in zip(mine, zip(*found, strict=True), strict=True):
            results[index] = result
    return results


def _check_device(op: str, *tensors: Tensor | None) -> None:
    """Where one tensor is on `meta` or fake, torch runs the fake op for all of them."""
    devices = sorted({tensor.device.type for tensor in tensors if tensor is not None})
    if len(devices) > 1:
        raise RuntimeError(f"{op}: expected tensors on one device, got {' and '.join(devices)}")


@torch.library.register_fake("gls_fused::precondition_rows")
def _(
    rows: Tensor, basis: Tensor, core_inverse: Tensor, shift: Tensor, ones: bool
) -> tuple[Tensor, Tensor]:
    _check_device("precondition_rows", rows, basis, core_inverse, shift)
    return rows.new_empty(rows.shape), rows.new_empty(rows.shape[0] if ones else 0)


@torch.library.register_fake("gls_fused::precondition_gradient")
def _(
    weight_gradient: Tensor,
    bias_gradient: Tensor | None,
    basis: Tensor,
    core_inverse: Tensor,
    shift: Tensor,
) -> tuple[Tensor, Tensor]:
    parts = (basis, core_inverse, shift)
    _check_device("precondition_gradient", weight_gradient, bias_gradient, *parts)
    outputs = 0 if bias_gradient is None else bias_gradient.shape[0]
    direction = weight_gradient.new_empty(weight_gradient.shape)
    on_cpu = weight_gradient.device.type == "cpu"
    if on_cpu and cpu_factors.is_turned(weight_gradient):
        # There it lies as the gradient does.
        direction = weight_gradient.new_empty(weight_gradient.T.shape).T
    return direction, weight_gradient.new_empty(outputs)


@torch.library.register_fake("gls_fused::take_patches")
def _(
    images: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output_padding: list[int] | None,
    groups: int,
    places: Tensor,
) -> Tensor:
    _check_device("take_patches", images, places)
    size = images.shape[1] // groups * math.prod(kernel_size)
    return images.new_empty(places.shape[0], size)


@torch.library.register_fake("gls_fused::sketch_rows")
def _(rows: Tensor, basis: Tensor, ones: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_device("sketch_rows", rows, basis)
    dim, rank = basis.shape
    return basis.new_empty(rank, rank), basis.new_empty(rank, dim).T, basis.new_empty(())


@torch.library.register_fake("gls_fused::blend_subspaces")
def _(
    bases: list[Tensor],
    cores: list[Tensor],
    traces: list[Tensor],
    samples: list[Tensor],
    sums: list[Tensor],
    beta: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    _check_device("blend_subspaces", *bases, *cores, *traces, *samples, *sums)
    sketches = [basis.new_empty(basis.shape[::-1]).T for basis in bases]
    moved = [core.new_empty(core.shape) for core in cores]
    means, rows = ([trace.new_empty(()) for trace in traces] for _ in range(2))
    return sketches, moved, means, rows


@torch.library.register_fake("gls_fused::refresh_subspace")
def _(core: Tensor, sketch: Tensor) -> tuple[Tensor, Tensor]:
    _check_device("refresh_subspace", core, sketch)
    return sketch.new_empty(sketch.shape[::-1]).T, core.new_empty(core.shape)


@torch.library.register_fake("gls_fused::refresh_subspaces")
def _(cores: list[Tensor], sketches: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    _check_device("refresh_subspaces", *cores, *sketches)
    bases = [sketch.new_empty(sketch.shape[::-1]).T for sketch in sketches]
    return bases, [core.new_empty(core.shape) for core in cores]


@torch.library.register_fake("gls_fused::invert_cores")
def _(
    cores: list[Tensor],
    traces: list[Tensor],
    dims: list[int],
    damping: float,
    power: float,
    samples: list[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    _check_device("invert_cores", *cores, *traces, *samples)
    inverses = [core.new_empty(core.shape) for core in cores]
    return inverses, [core.new_empty(()) for core in cores]


@torch.library.register_fake("gls_fused::invert_core")
def _(
    core: Tensor,
    trace: Tensor,
    dim: int,
    damping: float,
    power: float = 1,
    samples: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_device("invert_core", core, trace, samples)
    return core.new_empty(core.shape), core.new_empty(())


@torch.library.register_fake("gls_fused::commit_subspaces_")
def _(*args: Any) -> None:
    # bases to gradients.
    _check_device("commit_subspaces_", *itertools.chain(*args[:8]))


@torch.library.register_fake("gls_fused::measure_weights_")
def _(weights: list[Tensor], results: list[Tensor], least: list[float]) -> None:
    _check_device("measure_weights_", *weights, *results)


@torch.library.register_fake("gls_fused::measure_growths_")
def _(*args: Any) -> None:
    # squares to steps.
    _check_device("measure_growths_", *itertools.chain(*args[:4]))


@torch.library.register_fake("gls_fused::add_sketch_")
def _(rows: Tensor, basis: Tensor, ones: bool, sums: Tensor) -> None:
    _check_device("add_sketch_", rows, basis, sums)


@torch.library.register_fake("gls_fused::orthogonalize_each")
def _(
    matrices: list[Tensor], lengths: list[float], split: int, coefficients: list[float]
) -> list[Tensor]:
    _check_device("orthogonalize_each", *matrices)
    return [matrix.new_empty(matrix.shape) for matrix in matrices]


@torch.library.register_fake("gls_fused::blend_directions_")
def _(params: list[Tensor], gradients: list[Tensor], *args: Any) -> list[Tensor]:
    _check_device("blend_directions_", *params, *gradients)
    layer_sizes = args[6]
    firsts = itertools.accumulate(layer_sizes[:-1], initial=0)
    weights = (params[first] for first in firsts)
    return [weight.new_empty(len(weight), weight[0].numel()) for weight in weights]


@torch.library.register_fake("gls_fused::move_weights_")
def _(weights: list[Tensor], updates: list[Tensor], *args: Any) -> None:
    _check_device("move_weights_", *weights, *updates)


@torch.library.register_fake("gls_fused::update_layers_")
def _(*args: Any, **scalars: Any) -> None:
    # params to shifts.
    _check_device("update_layers_", *itertools.chain(*args[:8]))
