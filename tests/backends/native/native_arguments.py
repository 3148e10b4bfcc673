"""Arguments that the native ops take, shared by their tests."""

import torch


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


def update_options(**changes):
    """Arguments of update_layers_ for one layer [2, 3] with a bias, but layer_sizes."""
    options = {
        "params": [ones(2, 3), ones(2)],
        "gradients": [ones(2, 3), ones(2)],
        "exp_avgs": [],
        "exp_avg_sqs": [],
        "steps": [torch.zeros(())],
        "bases": [None],
        "core_inverses": [None],
        "shifts": [None],
        "normalize": "none",
        "lr": 0.1,
        "momentum": 0.0,
        "beta2": 0.9,
        "eps": 0.0,
        "weight_decay": 0.0,
    }
    return {**options, **changes}


def inverse_options():
    return {"basis": ones(4, 2), "core_inverse": ones(2, 2), "shift": ones()}


def valid_arguments(op):
    return {
        "precondition_rows": {"rows": ones(5, 3), **inverse_options(), "ones": True},
        "precondition_gradient": {
            "weight_gradient": ones(5, 3), "bias_gradient": ones(5), **inverse_options(),
        },
        "sketch_rows": {"rows": ones(5, 3), "basis": ones(4, 2), "ones": True},
        "add_sketch_": {"rows": ones(5, 3), "basis": ones(4, 2), "ones": True, "sums": ones(14)},
        "take_patches": {
            "images": ones(2, 4, 5), "kernel_size": [3], "stride": [1], "padding": [1],
            "dilation": [1], "output_padding": None, "groups": 2, "places": torch.arange(20),
        },
        "commit_subspaces_": {
            "bases": [torch.eye(4)[:, :2].T.contiguous().T], "cores": [torch.eye(2)],
            "traces": [ones()], "samples": [ones()], "core_inverses": [ones(2, 2)],
            "shifts": [ones()], "sums": [ones(14)], "gradients": [ones(5, 3), ones(5)],
            "gradient_counts": [2], "beta": 0.9, "damping": 0.1, "power": 1.0,
        },
        "measure_weights_": {
            "weights": [ones(2, 3), ones(4, dtype=torch.bfloat16)], "results": [ones(), ones()],
            "least": [0.1, 0.2],
        },
        "measure_growths_": {
            "squares": [ones(3), ones()], "growths": [ones(), ones()], "slows": [ones(), ones()],
            "steps": [ones(), ones()], "beta2": 0.9, "every": 10, "most": 2.0,
        },
        "refresh_subspace": {"core": torch.eye(2), "sketch": torch.eye(4)[:, :2]},
        "invert_core": {"core": torch.eye(2), "trace": ones(), "dim": 4, "damping": 0.1},
        "orthogonalize_each": {
            "matrices": [ones(2, 3), ones(4, 1)], "lengths": [2.0, 1.0], "split": 2,
            "coefficients": [3.0, -2.0, 1.0],
        },
        "blend_directions_": {
            "params": [ones(2, 3), ones(2)], "gradients": [ones(2, 3), ones(2)],
            "exp_avgs": [ones(2, 3), ones(2)], "exp_avg_sqs": [ones(2)],
            "steps": [torch.zeros(())], "bases": [ones(4, 2)], "core_inverses": [ones(2, 2)],
            "shifts": [ones()], "layer_sizes": [2], "lr": 0.1, "momentum": 0.9,
            "beta2": 0.9, "eps": 0.0, "weight_decay": 0.0, "lr_bounds": None,
        },
        "move_weights_": {
            "weights": [ones(2, 3), ones(3, 2).T], "updates": [ones(2, 3), ones(2, 3)],
            "lr": 0.1, "weight_decay": 0.0, "lr_bounds": None,
        },
        "round_params_": {
            "params": [ones(2, 3, dtype=torch.bfloat16), ones(4, dtype=torch.bfloat16)],
            "values": [ones(2, 3), ones(4)], "seeds": [0, 2**32 - 1], "steps": [ones(), ones()],
        },
        "update_layers_": update_options(
            exp_avgs=[ones(2, 3), ones(2)],
            exp_avg_sqs=[ones()],
            bases=[ones(4, 2)],
            core_inverses=[ones(2, 2)],
            shifts=[ones()],
            layer_sizes=[2],
            normalize="rms",
            momentum=0.9,
        ),
    }[op]  # fmt: skip
