"""Arguments of the wrong shape, dtype, device or layout, to each native op."""

import pytest
import torch
from native_arguments import ones, update_options, valid_arguments
from torch.utils._pytree import tree_leaves

from gls_fused import available_backends
from gls_fused.backends.dispatch import resolve_backend

if (why := available_backends()["native"]) is not None:
    pytest.skip(why, allow_module_level=True)
resolve_backend("native", ["cpu"])
ops = torch.ops.gls_fused

HALF = {"dtype": torch.bfloat16}
META = {"device": "meta"}
# ops, the arguments that change, what they expect and what they got
REFUSED = [
    ("precondition_rows sketch_rows add_sketch_", {"rows": ones(5)}, r"rows \[n, k\] .*got \[5\]"),
    (
        "precondition_rows sketch_rows add_sketch_",
        {"rows": ones(5, 3, dtype=torch.int64)},
        "rows .* floating-point dtype, got .* of Long",
    ),
    (
        "precondition_rows precondition_gradient sketch_rows add_sketch_",
        {"basis": ones(3, 2)},
        r"basis \[4, r\], got \[3, 2\]",
    ),
    (
        "precondition_rows precondition_gradient sketch_rows add_sketch_",
        {"basis": ones(4, 2, **HALF)},
        "basis of Float or Double, got BFloat16",
    ),
    (
        "precondition_rows precondition_gradient sketch_rows add_sketch_",
        {"basis": ones(4, 2, **META)},
        "tensors on one device, got cpu and meta",
    ),
    (
        "precondition_rows precondition_gradient",
        {"core_inverse": ones(2, 3)},
        r"core_inverse \[2, 2\], got \[2, 3\]",
    ),
    (
        "precondition_rows precondition_gradient",
        {"shift": ones(dtype=torch.float64)},
        "core_inverse and shift of Float, got Float and Double",
    ),
    ("precondition_rows precondition_gradient", {"shift": ones(2)}, r"shift \[\], got \[2\]"),
    ("take_patches", {"images": ones(2, 4)}, r"images \[N, c, ...\] of 1 to 3 .*got \[2, 4\]"),
    ("take_patches", {"stride": [1, 1]}, r"1 numbers each of kernel_size.*got \[1, 1\]"),
    ("take_patches", {"dilation": [0]}, r"kernel_size, stride and dilation above 0.* \[0\]"),
    ("take_patches", {"output_padding": [0, 0]}, r"1 numbers .* output_padding, got \[0, 0\]"),
    ("take_patches", {"groups": 3}, "channels in 3 equal groups, got 4"),
    ("take_patches", {"places": ones(3)}, r"contiguous places \[n\] of Long, got \[3\] of Float"),
    ("take_patches", {"places": torch.tensor([0, 20])}, r"places in \[0, 20\), got 20"),
    ("take_patches", {"places": torch.tensor([-1])}, r"places in \[0, 20\), got -1"),
    ("round_params_", {"seeds": [1]}, "2 values, seeds and steps, got 2, 1 and 2"),
    ("round_params_", {"seeds": [0, -1]}, r"seeds in \[0, 2\^32\), got -1"),
    ("round_params_", {"seeds": [2**32, 0]}, r"seeds in \[0, 2\^32\), got 4294967296"),
    (
        "round_params_",
        {"params": [ones(2, 3), ones(4)]},
        "parameters of BFloat16 or Half, got Float",
    ),
    (
        "round_params_",
        {"params": [ones(2, 3, **HALF), ones(4, dtype=torch.float16)]},
        "parameters of one dtype, got Half beside BFloat16",
    ),
    ("round_params_", {"values": [ones(3, 2), ones(4)]}, r"values \[2, 3\] .* got \[3, 2\]"),
    (
        "round_params_",
        {"values": [ones(2, 3), ones(4, **HALF)]},
        r"values \[4\] of Float, got \[4\] of BFloat16",
    ),
    ("round_params_", {"steps": [ones(), ones(2)]}, r"steps of one Float.* got \[2\]"),
    ("orthogonalize_each", {"split": 3}, r"matrices .* of split 3, got \[2, 3\]"),
    ("orthogonalize_each", {"lengths": [1.0]}, "a length for each of 2 matrices, got 1"),
    ("orthogonalize_each", {"coefficients": [1.0] * 4}, "three coefficients a step, got 4"),
    (
        "orthogonalize_each",
        {"matrices": [ones(2, 3), ones(2, 3, dtype=torch.float64)]},
        "matrices of one dtype, got Double beside Float",
    ),
    (
        "orthogonalize_each",
        {"matrices": [ones(2, 3), ones(2, 3, **META)]},
        "tensors on one device, got cpu and meta",
    ),
    ("blend_directions_", {"steps": [ones(0)]}, r"steps \[\], got \[0\]"),
    ("blend_directions_", {"steps": []}, "a step .* for each of 1 layers, got 0 and 1"),
    ("blend_directions_", {"exp_avgs": []}, "gradients .* for each of 2 params, got 2 and 0"),
    (
        "blend_directions_",
        {"layer_sizes": [1], "bases": [ones(3, 2)]},
        r"layer_sizes that add up to 2 params, got \[1\]",
    ),
    ("blend_directions_", {"layer_sizes": [3]}, r"layer_sizes of 1 or 2 .* 2 params, got \[3\]"),
    (
        "blend_directions_",
        {"gradients": [ones(3, 2), ones(2)]},
        r"a gradient and exp_avg shaped as the parameter, \[2, 3\], got \[3, 2\]",
    ),
    (
        "blend_directions_",
        {"exp_avgs": [ones(3, 2).T, ones(2)]},
        "exp_avgs contiguous",
    ),
    ("blend_directions_", {"exp_avg_sqs": [ones(3)]}, r"a contiguous .* got \[2\] and \[3\]"),
    (
        "blend_directions_",
        {"exp_avgs": [ones(2, 3), ones(2, dtype=torch.float64)]},
        "tensors of one dtype, got Double beside Float",
    ),
    (
        "blend_directions_",
        {"gradients": [ones(2, 3, **META), ones(2)]},
        "tensors on one device, got cpu and meta",
    ),
    ("blend_directions_", {"bases": []}, "1 bases, core_inverses and shifts, got 0, 1 and 1"),
    ("blend_directions_", {"shifts": [None]}, "basis, .* together, got 1, 1 and 0"),
    ("blend_directions_", {"bases": [ones(3, 2)]}, r"basis \[4, r\], got \[3, 2\]"),
    ("blend_directions_", {"lr_bounds": ones(2)}, r"lr_bounds \[1\], got \[2\]"),
    ("move_weights_", {"updates": [ones(2, 3)]}, "an update for each of 2 weights, got 1"),
    (
        "move_weights_",
        {"updates": [ones(3, 2), ones(2, 3)]},
        r"an update \[m, k\] for a weight of \[2, 3\], got \[3, 2\]",
    ),
    (
        "move_weights_",
        {"weights": [ones(4, 3)[::2], ones(2, 3)]},
        r"weights that are contiguous or turned, got strides \[6, 1\]",
    ),
    (
        "move_weights_",
        {"updates": [ones(2, 3), ones(2, 3, dtype=torch.float64)]},
        "tensors of one dtype, got Double beside Float",
    ),
    ("move_weights_", {"lr_bounds": ones(1)}, r"lr_bounds \[2\], got \[1\]"),
    (
        "precondition_gradient",
        {"weight_gradient": ones(3)},
        r"weight_gradient \[m, k\] .* got \[3\]",
    ),
    (
        "precondition_gradient",
        {"bias_gradient": ones(4)},
        r"bias_gradient \[5\] of Float, got \[4\]",
    ),
    (
        "precondition_gradient",
        {"bias_gradient": ones(5, **HALF)},
        r"bias_gradient \[5\] of Float, got \[5\] of BFloat16",
    ),
    ("add_sketch_", {"sums": ones(13)}, r"sums \[14\] of Float, got \[13\]"),
    (
        "add_sketch_",
        {"sums": ones(14, dtype=torch.float64)},
        r"sums \[14\] of Float, got \[14\] of Double",
    ),
    ("commit_subspaces_", {"shifts": []}, "1 core_inverses, shifts and .*, got 1, 0 and 1"),
    ("commit_subspaces_", {"gradient_counts": [1]}, "1 gradients, got 2"),
    ("commit_subspaces_", {"gradient_counts": [-1]}, r"gradient_counts of at least 0, got \[-1\]"),
    ("commit_subspaces_", {"sums": [ones(13)]}, r"sums \[14\] of Float, got \[13\]"),
    ("commit_subspaces_", {"core_inverses": [ones(3, 3)]}, r"core_inverse \[2, 2\] .*\[3, 3\]"),
    ("commit_subspaces_", {"bases": [torch.eye(4)[:, :2]]}, r"basis by columns, .*\[4, 1\]"),
    (
        "commit_subspaces_",
        {"gradients": [ones(5, 3, dtype=torch.int32), ones(5)]},
        "gradients of floating point, got Int",
    ),
    ("commit_subspaces_", {"shifts": [ones(**META)]}, "tensors on one device, got cpu and meta"),
    ("measure_weights_", {"least": [0.1]}, "2 results and least, got 2 and 1"),
    (
        "measure_weights_",
        {"weights": [ones(2, dtype=torch.int32), ones(2)]},
        "weights of floating point, got Int",
    ),
    (
        "measure_weights_",
        {"results": [ones(1), ones()]},
        r"results \[\] of Float or Double, got \[1\] of Float",
    ),
    ("measure_weights_", {"results": [ones(**META), ones()]}, "tensors on one device, got cpu"),
    ("measure_growths_", {"slows": [ones()]}, "2 growths, slows and steps, got 2, 1 and 2"),
    (
        "measure_growths_",
        {"squares": [ones(3, **HALF)] * 2},
        "squares of Float or Double, got BFloat16",
    ),
    (
        "measure_growths_",
        {"growths": [ones(1), ones()]},
        r"growths and slows \[\] of Float, got \[1\] of Float",
    ),
    ("measure_growths_", {"steps": [ones(2), ones()]}, r"steps of one number, got \[2\]"),
    ("measure_growths_", {"slows": [ones(**META), ones()]}, "tensors on one device, got cpu"),
    ("refresh_subspace", {"core": ones(3, 3)}, r"core \[2, 2\], got \[3, 3\]"),
    ("refresh_subspace", {"core": ones(2, 2, **HALF)}, "core of Float or Double, got BFloat16"),
    ("refresh_subspace", {"sketch": ones(1, 2)}, r"sketch .* with r at most d, got \[1, 2\]"),
    (
        "refresh_subspace",
        {"sketch": ones(4, 2, dtype=torch.float64)},
        r"sketch \[d, r\] of Float .* got \[4, 2\] of Double",
    ),
    ("refresh_subspace", {"sketch": ones(4, 2, **META)}, "tensors on one device, got cpu and meta"),
    ("invert_core", {"core": ones()}, r"core \[r, r\] with r at most 4, got \[\]"),
    ("invert_core", {"core": ones(5, 5)}, r"core \[r, r\] with r at most 4, got \[5, 5\]"),
    ("invert_core", {"core": ones(2, 2, **HALF)}, "core of Float or Double, got BFloat16"),
    ("invert_core", {"trace": ones(2)}, r"trace \[\] of Float, got \[2\]"),
    ("invert_core", {"trace": ones(**META)}, "tensors on one device, got cpu and meta"),
    ("invert_core", {"dim": 0}, "dim at least 1, got 0"),
    ("update_layers_", {"gradients": [ones(2, 3)]}, "2 gradients, got 1"),
    (
        "update_layers_",
        {"gradients": [ones(3, 2), ones(2)]},
        r"gradients \[2, 3\] .* got \[3, 2\]",
    ),
    (
        "update_layers_",
        {"gradients": [ones(2, 3), ones(2, dtype=torch.int32)]},
        r"gradients \[2\] of a floating-point dtype, got \[2\] of Int",
    ),
    (
        "update_layers_",
        {"gradients": [ones(2, 3, **META), ones(2)]},
        "tensors on one device, got cpu and meta",
    ),
    (
        "update_layers_",
        {"params": [ones(2, 3), ones(2, **HALF)]},
        "parameters of Float, got BFloat16",
    ),
    (
        "update_layers_",
        {"params": [ones(2, 3, dtype=torch.int64), ones(2, dtype=torch.int64)]},
        "parameters of Float, Double, BFloat16 or Half, got Long",
    ),
    (
        "update_layers_",
        {"params": [ones(1, 3).expand(2, 3), ones(2)]},
        r"params whose elements do not share memory, got strides \[0, 1\]",
    ),
    ("update_layers_", {"exp_avgs": []}, "exp_avgs exactly with momentum, got 0"),
    (
        "update_layers_",
        {"exp_avgs": [ones(2, 3), ones(3)]},
        r"exp_avgs \[2\], got \[3\]",
    ),
    (
        "update_layers_",
        {"exp_avgs": [ones(2, 3), ones(1).expand(2)]},
        "exp_avgs whose elements do not share memory",
    ),
    ("update_layers_", {"exp_avg_sqs": []}, "1 exp_avg_sqs for normalize rms, got 0"),
    (
        "update_layers_",
        {"exp_avg_sqs": [ones(dtype=torch.float64)]},
        r"exp_avg_sqs \[\] of Float, got \[\] of Double",
    ),
    (
        "update_layers_",
        {"normalize": "adam", "exp_avg_sqs": [ones(2, 3), ones()]},
        r"exp_avg_sqs \[2\], got \[\]",
    ),
    ("update_layers_", {"steps": []}, "1 steps, got 0"),
    ("update_layers_", {"steps": [ones(2)]}, r"steps \[\], got \[2\]"),
    (
        "update_layers_",
        {"normalize": "max"},
        "normalize rms, row, factored, adam, sgd or none, got max",
    ),
    ("update_layers_", {"normalize": "row"}, r"exp_avg_sqs \[2\] of Float, contiguous, got \[\]"),
    ("update_layers_", {"rates": ones(1)}, r"rates \[1, 2\] of Float or Double, got \[1\]"),
    ("update_layers_", {"rates": ones(2, 2)}, r"rates \[1, 2\] of Float or Double, got \[2, 2\]"),
    ("invert_core", {"power": 2.0}, "power 1, 0.75, 0.5 or 0.25, got 2"),
    ("update_layers_", {"layer_sizes": [1]}, "layer_sizes to sum to 2, got 1"),
    ("update_layers_", {"layer_sizes": [-1]}, "layer_sizes of 1 or 2, got -1"),
    ("update_layers_", {"bases": []}, "1 bases, core_inverses and shifts, got 0, 1 and 1"),
    ("update_layers_", {"bases": [ones(3, 2)]}, r"basis \[4, r\], got \[3, 2\]"),
    ("update_layers_", {"shifts": [None]}, "basis, core_inverse and shift .* together"),
    (
        "update_layers_",
        {"params": [ones(2), ones(2)], "gradients": [ones(2), ones(2)],
         "exp_avgs": [ones(2), ones(2)]},
        r"weight \[m, ...\] beside an inverse, got \[2\]",
    ),
    (
        "update_layers_",
        {"params": [ones(2, 3), ones(1)], "gradients": [ones(2, 3), ones(1)],
         "exp_avgs": [ones(2, 3), ones(1)]},
        r"bias \[2\], got \[1\]",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [(op, change, message) for names, change, message in REFUSED for op in names.split()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_refused(op, change, message):
    arguments = valid_arguments(op)
    getattr(ops, op)(**arguments)
    arguments.update(change)
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(RuntimeError, match=f"^{op}: expected {message}"):
        getattr(ops, op)(**arguments)
    for tensor, old in zip(tensors, before, strict=True):
        assert tensor.is_meta or torch.equal(tensor, old)


def test_sparse_parameters_have_no_kernel():
    options = update_options(params=[torch.eye(3).to_sparse()], gradients=[ones(3, 3)])
    with pytest.raises(NotImplementedError, match=r"'gls_fused::update_layers_'.*'SparseCPU'"):
        ops.update_layers_(**options, layer_sizes=[1])
