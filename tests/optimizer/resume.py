"""Training that is cut: run as a script in a fresh process, it goes on from a file.

python tests/optimizer/resume.py FILE: {name: (spec, saved state)} is read, {name: parameters}
written back.
"""

import itertools
import sys

import torch
from nets import CONVOLUTIONS, loss_of, make_batch, make_net, snapshot

from gls_fused import GLS

STEPS, CUT = 7, 4
SITES, NORMALIZATIONS = ("step", "backward"), ("rms", "factored", "adam", "sgd", "none")
STORED = (
    (torch.float32, "nearest"),
    (torch.bfloat16, "nearest"),
    (torch.bfloat16, "stochastic"),
    (torch.bfloat16, "master"),
)
# At the second site of "sgd" there is no true gradient to take the norm of.
SPECS = {
    f"{kind}-{site}-{normalize}-{momentum}-{str(dtype)[6:]}-{low}": {
        "kind": kind,
        "dtype": dtype,
        "options": {
            "site": site,
            "normalize": normalize,
            "momentum": momentum,
            "low_precision": low,
        },
    }
    for kind, site, normalize, momentum, (dtype, low) in itertools.chain(
        itertools.product(("mlp", "cnn"), SITES, NORMALIZATIONS, (0.0, 0.9), STORED[:2]),
        itertools.product(("mlp",), SITES, ("rms", "adam"), (0.0, 0.9), STORED[2:]),
        itertools.product(("turned", "experts"), ("step",), ("factored",), (0.9,), STORED),
        itertools.product(CONVOLUTIONS, ("backward",), ("factored",), (0.9,), STORED[:1]),
    )
    if (site, normalize) != ("backward", "sgd")
}


class Run:
    """Layers and a norm, GLS, a scheduler, and a scaler that meets an overflow."""

    def __init__(self, spec):
        torch.manual_seed(1)
        self.kind, self.dtype = spec["kind"], spec["dtype"]
        self.model = make_net(self.kind)
        self.model.norm = torch.nn.LayerNorm(3, dtype=torch.float64)
        self.model.to(self.dtype)
        self.optimizer = GLS(self.model, lr=0.02, rank=4, curvature_every=2, **spec["options"])
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)

    def parts(self):
        return self.model, self.optimizer, self.scheduler, self.scaler

    def state_dicts(self):
        return [part.state_dict() for part in self.parts()]

    def load(self, states):
        for part, state in zip(self.parts(), states, strict=True):
            part.load_state_dict(state)

    def train(self, first, last):
        for step in range(first, last):
            inputs, targets = (x.to(self.dtype) for x in make_batch(self.kind, 9, step))
            loss = loss_of(lambda x: self.model.norm(self.model(x)), (inputs, targets))
            if step in (1, 5):
                loss = loss * torch.inf
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
        return snapshot(self.model)


def go_on(spec, states, first):
    run = Run(spec)
    run.load(states)
    return run.train(first, STEPS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    saved = torch.load(sys.argv[1], weights_only=True)
    found = {name: go_on(*arguments) for name, arguments in saved.items()}
    torch.save(found, sys.argv[1])
