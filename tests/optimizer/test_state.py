"""A saved state: in another process, of another model, of other options."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import OPTIONS, assert_equal, assert_same_state, make_net, make_trained, train
from resume import CUT, SPECS, STEPS, Run
from torch import nn

from gls_fused import GLS, attach


@pytest.fixture(scope="session")
def resumed(tmp_path_factory):
    """Of every spec, the parameters after training that was cut, and never cut."""
    whole, cut = {}, {}
    for name, spec in SPECS.items():
        run = Run(spec)
        run.train(0, CUT)
        cut[name] = (spec, copy.deepcopy(run.state_dicts()), CUT)
        whole[name] = run.train(CUT, STEPS)
    path = tmp_path_factory.mktemp("state") / "cut.pt"
    torch.save(cut, path)
    folder = Path(__file__).parent
    roots = (folder.parents[1], folder.parent, folder)
    paths = os.pathsep.join([*map(str, roots), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", str(folder / "resume.py"), str(path)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths})
    return whole, torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", SPECS)
def test_fresh_process_goes_on_bit_for_bit(resumed, name):
    whole, found = (runs[name] for runs in resumed)
    assert all(p.isfinite().all() for p in whole)
    assert_equal(found, whole)


@pytest.mark.parametrize(
    "name", ["mlp-backward-rms-0.9-float32-nearest", "mlp-step-adam-0.9-bfloat16-master"]
)
@pytest.mark.parametrize("cut", range(STEPS))
def test_saved_at_any_step(name, cut):
    run, later = Run(SPECS[name]), Run(SPECS[name])
    run.train(0, cut)
    later.load(copy.deepcopy(run.state_dicts()))
    assert_equal(later.train(cut, STEPS), run.train(cut, STEPS))


@pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
def test_state_of_a_16_bit_model_stays_float32(low_precision):
    name = f"mlp-step-adam-0.9-bfloat16-{low_precision}"
    run, later = Run(SPECS[name]), Run(SPECS[name])
    run.train(0, 4)
    later.load(run.state_dicts())
    for optimizer in (run.optimizer, later.optimizer):
        tensors = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        masters = sum("master" in state for state in optimizer.state.values())
        assert masters == (len(optimizer.state) if low_precision == "master" else 0)
    assert_same_state(later.optimizer.state_dict(), run.optimizer.state_dict())


def test_state_holds_tensors_and_plain_numbers():
    _, optimizer = make_trained()
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        assert all(isinstance(value, torch.Tensor | int) for value in state.values())
    for group in saved["param_groups"]:
        assert group.pop("params") == list(range(8))
        assert all(isinstance(value, int | float | str | None) for value in group.values())
        assert group["version"] == 6


def test_state_is_its_own_after_another_normalize_was_chosen():
    model, optimizer = make_trained(normalize="factored", max_change=0.1)
    for normalize in ("row", "rms", "factored"):
        optimizer.param_groups[0]["normalize"] = normalize
        train(model, optimizer, range(3))
        twin = GLS(make_net("mlp"), **OPTIONS)
        twin.load_state_dict(optimizer.state_dict())
        assert ("exp_avg_sq_columns" in twin.state[twin.param_groups[0]["params"][0]]) == (
            normalize == "factored"
        )


def test_loaded_state_is_a_copy():
    """One state loaded twice: training from it does not change it."""
    model, optimizer = make_trained()
    saved, weights = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(saved)
    trajectories = []
    later = make_net("mlp")
    for _ in range(2):
        later.load_state_dict(weights)
        twin = GLS(later, **OPTIONS)
        twin.load_state_dict(saved)
        trajectories.append(train(later, twin, range(4, 8)))
        assert_same_state(saved, expected)
    assert_equal(*trajectories)


def test_inverses_are_views_of_the_state():
    _, optimizer = make_trained()
    optimizer.load_state_dict(optimizer.state_dict())
    for layer in optimizer._preconditioner.layers:
        state = optimizer.state[layer.weight]
        for name, part in zip(("basis", "core_inverse", "shift"), layer.inverse, strict=True):
            assert part.data_ptr() == state[name].data_ptr()


# ---- what is refused -----------------------------------------------------------------------------


def other_width(saved):
    model = nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    optimizer = GLS(model, **OPTIONS)
    model(torch.ones(4, 7)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def other_rank(saved):
    return make_trained(rank=3)[1].state_dict()


def other_curvature(saved):
    return make_trained(curvature="dense")[1].state_dict()


def other_outputs(saved):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5))
    optimizer = GLS(model, **OPTIONS, momentum=0.0)
    model(torch.ones(4, 6)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def other_normalize(saved):
    saved["param_groups"][0]["normalize"] = "adam"
    return saved


def later_version(saved):
    saved["param_groups"][0]["version"] = 7
    return saved


def of_adam(saved):
    return torch.optim.Adam(make_net("mlp").parameters()).state_dict()


def fewer_layers(saved):
    return make_trained_on(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8)), 6).state_dict()


def no_core(saved):
    del saved["state"][2]["core"]
    return saved


def unknown_entry(saved):
    saved["state"][2]["gram"] = torch.ones(2, 2)
    return saved


def more_groups(saved):
    saved["param_groups"] *= 2
    return saved


def make_trained_on(model, width):
    optimizer = GLS(model, **OPTIONS)
    model(torch.ones(4, width)).sum().backward()
    optimizer.step()
    return optimizer


def other_rank_before_the_first_step(saved):
    return GLS(make_net("mlp"), **{**OPTIONS, "rank": 3}).state_dict()


REFUSED = {
    other_rank_before_the_first_step: r"expected basis \[7, 4\].*, got a state for basis \[7, 3\]",
    other_width: r"layer 'stem': expected (exp_avg|basis) \[., .\], got \[8, .\]",
    other_rank: r"layer 'stem': expected basis \[7, 4\], got \[7, 3\]",
    other_curvature: r"layer 'stem': expected basis \[7, 4\], .*, got gram \[7, 7\], samples",
    other_outputs: r"layer 'head': expected a state of a weight \[3, 8\], got one of \[5, 8\]",
    other_normalize: r"layer 'stem': expected .*exp_avg_sq \[8, 6\], .*got exp_avg_sq_columns",
    later_version: r"version: expected a state of 0 to 6, got 7",
    of_adam: r"group 0: expected the options of GLS, got none named 'damping'",
    fewer_layers: r"state_dict: expected 8 parameters in group 0, got 4",
    no_core: r"layer 'first': expected basis .*, core \[4, 4\], .*, got basis",
    unknown_entry: r"layer 'first': expected .*, got gram \[2, 2\]",
    more_groups: r"state_dict: expected 1 groups, got 2",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_state_that_does_not_fit_is_refused_whole(spoil):
    model, optimizer = make_trained()
    before = copy.deepcopy(optimizer.state_dict())
    twin, untouched = make_trained()
    with pytest.raises(ValueError, match=REFUSED[spoil]):
        optimizer.load_state_dict(spoil(copy.deepcopy(before)))
    assert_same_state(optimizer.state_dict(), before)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
    # The rows gathered and the inverses are as they were too.
    steps = range(4, 7)
    assert_equal(train(model, optimizer, steps), train(twin, untouched, steps))


def in_group(key, value):
    return lambda saved: saved["param_groups"][0].update({key: value})


def in_weight(key, value):
    return lambda saved: saved["state"][2].update({key: value})


def spread_basis(saved):
    saved["state"][2]["basis"] = saved["state"][2]["basis"].to_sparse()


SPOILT = [
    (in_group("lr", -1.0), ValueError, "lr: expected a value in"),
    (in_group("lr", None), TypeError, "lr: expected a number"),
    (in_group("damping", float("nan")), ValueError, "damping"),
    (in_group("beta2", 1.0), ValueError, "beta2"),
    (in_group("max_change", -1.0), ValueError, "max_change"),
    (in_group("normalize", "x"), ValueError, "normalize: expected auto"),
    (in_group("power", 0.3), ValueError, "power"),
    (in_group("curvature_every", 0), ValueError, "curvature_every"),
    (in_group("low_precision", "x"), ValueError, "low_precision"),
    (in_group("seed", 1.5), ValueError, "seed"),
    (in_group("split", 3), ValueError, "split: expected a divisor of the 8 outputs of layer"),
    (in_group("step", "x"), ValueError, "group 0: expected step as a whole number"),
    (in_group("step", -1), ValueError, "group 0: expected step as a whole number"),
    (in_weight("basis", None), ValueError, "layer 'first': expected basis as a tensor, got None"),
    (in_weight("exp_avg", [1.0]), ValueError, "expected exp_avg as a tensor"),
    (in_weight("step", 3), ValueError, "expected step as a tensor, got 3"),
    (in_weight("rows", "x"), ValueError, "layer 'first': expected rows as a number, at least 0"),
    (in_weight("rows", float("nan")), ValueError, "expected rows as a number, at least 0, got nan"),
    (in_weight("due", -1), ValueError, "expected due as a number, at least 0, got -1"),
    (in_weight("at_step", torch.ones(2)), ValueError, "expected at_step as a number"),
    (in_weight("trace", torch.ones((), device="meta")), ValueError, "trace as a dense tensor with"),
    (spread_basis, ValueError, "basis as a dense tensor with values, got torch.sparse_coo on cpu"),
    (lambda saved: saved["state"].update({2: None}), TypeError, "parameter 2: expected a dict"),
    (lambda saved: saved.pop("state"), ValueError, "expected the keys 'state' and 'param_groups'"),
    (lambda saved: saved.update(state=[]), TypeError, "state_dict: state: expected a dict"),
    (lambda saved: saved["param_groups"].append(3), TypeError, "group 1: expected a dict"),
]


@pytest.mark.parametrize(("spoil", "error", "message"), SPOILT)
def test_state_of_wrong_values_is_refused_whole(spoil, error, message):
    model, optimizer = make_trained()
    before = copy.deepcopy(optimizer.state_dict())
    twin, untouched = make_trained()
    saved = copy.deepcopy(before)
    spoil(saved)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert_same_state(optimizer.state_dict(), before)
    steps = range(4, 7)
    assert_equal(train(model, optimizer, steps), train(twin, untouched, steps))


@pytest.mark.parametrize("convert", [torch.as_tensor, np.asarray, np.int64, float])
def test_numbers_that_were_converted_are_taken(convert):
    model, optimizer = make_trained()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["step"] = convert(saved["param_groups"][0]["step"])
    for state in saved["state"].values():
        for key in ("rows", "outputs", "at_step", "lent", "due"):
            if key in state:
                state[key] = convert(state[key])
    later = make_net("mlp")
    later.load_state_dict(model.state_dict())
    twin = GLS(later, **OPTIONS)
    twin.load_state_dict(saved)
    assert_equal(train(later, twin, range(4, 7)), train(model, optimizer, range(4, 7)))


@pytest.mark.parametrize("with_attach", [False, True])
def test_state_is_loaded_in_inference_mode(with_attach):
    """It is ordinary tensors that can be written to later."""
    found = []
    for mode in (True, False):
        model, optimizer = make_trained()
        saver = optimizer
        if with_attach:
            optimizer.detach()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            saver = attach(model, optimizer, rank=4)
            train(model, optimizer, range(2))
        saved = copy.deepcopy(saver.state_dict())
        with torch.inference_mode(mode):
            saver.load_state_dict(saved)
        found.append(train(model, optimizer, range(4, 7)))
    assert_equal(*found)


@pytest.mark.parametrize("saved", [None, [], "x"])
def test_no_saved_state(saved):
    _, optimizer = make_trained()
    with pytest.raises(TypeError, match="state_dict: expected a dict"):
        optimizer.load_state_dict(saved)
    with pytest.raises(TypeError, match="state_dict: expected a dict"):
        attach(make_net("mlp")).load_state_dict(saved)


def test_step_size_of_the_gradient_needs_the_site_that_keeps_it():
    model, optimizer = make_trained(normalize="sgd")
    saved = copy.deepcopy(optimizer.state_dict())
    later = make_net("mlp")
    with pytest.raises(ValueError, match=r"^site: normalize='sgd' needs the true gradient"):
        GLS(later, **OPTIONS, site="backward").load_state_dict(saved)
    for state in saved["state"].values():
        # "auto" then takes the backward, where it may.
        state.update(rows=1) if "rows" in state else None
    twin = GLS(later, **OPTIONS)
    twin.load_state_dict(saved)
    assert twin.report().count("site step") == twin.report().count("GLS (")
    later.load_state_dict(model.state_dict())
    assert_equal(train(later, twin, range(4, 8)), train(model, optimizer, range(4, 8)))


def test_state_without_a_version_is_taken():
    """The format before there was one."""
    model, optimizer = make_trained()
    saved = copy.deepcopy(optimizer.state_dict())
    for key in ("version", "low_precision", "seed"):
        del saved["param_groups"][0][key]
    for state in saved["state"].values():
        state.pop("outputs", None)
    later = make_net("mlp")
    later.load_state_dict(model.state_dict())
    twin = GLS(later, **OPTIONS)
    twin.load_state_dict(saved)
    assert_equal(train(later, twin, range(4, 8)), train(model, optimizer, range(4, 8)))
    assert twin.param_groups[0]["low_precision"] == "nearest"


def test_orthogonal_steps_of_before_begin_anew_with_scales(monkeypatch):
    """As "auto" once gave them to layers of models that normalise nothing."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    inputs = torch.randn(300, 16)

    def train(optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (model(inputs) - 1).square().sum().backward()
            optimizer.step()

    with monkeypatch.context() as patch:
        patch.setattr("gls_fused.capture.find.normalizes", lambda _: True)
        before = GLS(model)
        train(before, 20)
        assert ", spectral: " in before.report()
    after = GLS(model)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert ", spectral: " not in after.report()
    start = [param.detach().clone() for param in model.parameters()]
    train(after, 1)
    counts = [float(after.state[model[place].weight]["step"]) for place in (0, 2)]
    assert counts == [1, 21]
    for param, old in zip(model.parameters(), start, strict=True):
        # As much as max_change allows is ten times that.
        assert (param - old).square().mean().sqrt() < 3e-3


def test_state_of_version_4_keeps_its_orthogonal_steps():
    """Of layers whose factor takes more than a third of the flops, and at most half."""
    models = [
        nn.Sequential(nn.Linear(16, 16, bias=False), nn.LayerNorm(16), nn.Linear(16, 4))
        for _ in range(2)
    ]
    optimizers = [GLS(models[0], spectral_share=0.5), GLS(models[1])]
    inputs = torch.randn(200, 16)
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
        if step == 1:
            saved = copy.deepcopy(optimizers[0].state_dict())
            del saved["param_groups"][0]["spectral_share"]
            saved["param_groups"][0]["version"] = 4
            models[1].load_state_dict(models[0].state_dict())
            optimizers[1].load_state_dict(saved)
    assert "0: GLS (Linear 16 -> 16, 200 rows" in optimizers[1].report()
    assert "spectral: 40.0%" in optimizers[1].report()
    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.update(version=7), "version: expected a state of 0 to 6, got 7"),
        (
            lambda saved: saved["layers"]["first"].update(basis=torch.ones(9, 2)),
            r"layer 'first': expected basis \[9, 4\], got \[9, 2\]",
        ),
        (lambda saved: saved.update(step="x"), "state_dict: expected step as a whole number"),
        (lambda saved: saved.update(step=-3), "state_dict: expected step as a whole number"),
        (
            lambda saved: saved["layers"]["first"].update(core=None),
            "layer 'first': expected core as a tensor",
        ),
        (lambda saved: saved["layers"].pop("first"), r"expected the layers \['first', .*'stem'\]"),
    ],
)
def test_attachment_refuses_whole_what_does_not_fit(change, message):
    model = make_net("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = attach(model, optimizer, rank=4)
    train(model, optimizer, range(3))
    before = copy.deepcopy(handle.state_dict())
    saved = copy.deepcopy(before)
    change(saved)
    with pytest.raises(ValueError, match=message):
        handle.load_state_dict(saved)
    after = handle.state_dict()
    assert after["step"] == before["step"]
    assert_same_state(
        {"state": after["layers"], "param_groups": []},
        {"state": before["layers"], "param_groups": []},
    )
