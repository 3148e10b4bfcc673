"""GLS once more, from the equations of docs/method.md alone: slow, dense, in float64.

Nothing here is shared with the package. Rows and gradients are written down by plain hooks, every
P is a d x d matrix from its eigenvalues, orth is an SVD, the sums of a step are taken from all its
rows at once.
"""

import torch
from torch import nn


def with_ones(rows, layer):
    """The rows of a layer: a one appended where there is a bias."""
    ones = torch.ones(len(rows), 1, dtype=rows.dtype)
    return rows if layer.bias is None else torch.cat([rows, ones], 1)


def raise_inverse(matrix, power):
    """matrix^-power, of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors / values**power) @ vectors.T


def orth(matrix):
    """An orthonormal basis of as many columns."""
    return torch.linalg.svd(matrix, full_matrices=False)[0]


def polar_express(x):
    """The odd polynomial of x in [0, 1] that five steps of the iteration are."""
    coefficients = (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )
    x = x / 1.01
    for a, b, c in coefficients:
        y = x / 1.01
        x = a * y + b * y**3 + c * y**5
    return x


def spectral(matrix):
    """What stands for the orthogonal factor, from the singular values, at a length of .6."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    factor = (u * polar_express(values / values.norm())) @ v
    return 0.6 * max(matrix.shape) ** 0.5 * factor


class Samples:
    """How many rows of equal weight an average stands for: (sum of weights)^2 / sum of squares."""

    def __init__(self, rows):
        self.weights = torch.full((rows,), 1 / rows, dtype=torch.float64)

    def commit(self, rows, beta):
        new = torch.full((rows,), (1 - beta) / rows, dtype=torch.float64)
        self.weights = torch.cat([beta * self.weights, new])

    def limit(self, dim):
        """The number of eigenvalues that the damping is relative to the mean of."""
        return min(dim, self.weights.sum() ** 2 / self.weights.square().sum())


class DenseSigma:
    """Sigma, and P from it."""

    def start(self, a):
        self.sigma = a.T @ a / len(a)
        self.samples = Samples(len(a))

    def commit(self, a, beta):
        self.sigma = beta * self.sigma + (1 - beta) * a.T @ a / len(a)
        self.samples.commit(len(a), beta)

    def inverse(self, damping, power):
        d = len(self.sigma)
        damp = damping * self.sigma.trace() / self.samples.limit(d)
        return raise_inverse(self.sigma + damp * torch.eye(d, dtype=self.sigma.dtype), power)


class SubspaceSigma:
    """U, M and t; P is of U M U' + rho (I - U U') + lambda I as a d x d matrix."""

    def __init__(self, test_matrix):
        self.u = test_matrix

    def start(self, a):
        sigma = a.T @ a / len(a)
        self.samples = Samples(len(a))
        self.move(sigma, sigma.trace())

    def commit(self, a, beta):
        sigma = a.T @ a / len(a)
        self.samples.commit(len(a), beta)
        blended = beta * self.u @ self.m @ self.u.T + (1 - beta) * sigma
        self.move(blended, beta * self.t + (1 - beta) * sigma.trace())

    def move(self, sigma, t):
        """Nystrom's approximation of Sigma + mu I, without its mu, where Sigma + mu I takes U."""
        d, r = self.u.shape
        mu = t / d / 256
        # Inputs that have been other than 0.
        shifted = sigma + mu * torch.diag((sigma.diagonal() > 0).double())
        z = shifted @ self.u
        nystrom = z @ torch.linalg.inv(self.u.T @ z) @ z.T
        self.t, self.u = t, orth(z)
        self.m = self.u.T @ nystrom @ self.u - mu * torch.eye(r, dtype=torch.float64)

    def inverse(self, damping, power):
        d, r = self.u.shape
        eye, inside = torch.eye(d, dtype=self.u.dtype), self.u @ self.u.T
        sigma = self.u @ self.m @ self.u.T
        if r < d:
            sigma = sigma + max(self.t - self.m.trace(), 0) / (d - r) * (eye - inside)
        damp = damping * self.t / self.samples.limit(d)
        return raise_inverse(sigma + damp * eye, power)


class IndependentGLS:
    """Trains the nn.Linear layers of a model whose other modules have no parameters.

    Args:
        test_matrix: d -> Omega [d, r], or None for the dense curvature.
    """

    def __init__(
        self,
        model,
        *,
        lr,
        damping,
        momentum,
        beta,
        beta2,
        eps,
        weight_decay,
        normalize,
        curvature_every,
        power=1,
        max_change=None,
        max_growth=None,
        split=1,
        spectral_head=False,
        test_matrix=None,
    ):
        self.lr, self.damping, self.momentum, self.beta = lr, damping, momentum, beta
        self.beta2, self.eps, self.weight_decay, self.normalize = (
            beta2,
            eps,
            weight_decay,
            normalize,
        )
        self.curvature_every, self.power, self.max_change = curvature_every, power, max_change
        self.max_growth, self.split, self.spectral_head = max_growth, split, spectral_head
        self.layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        self.seen = {layer: [] for layer in self.layers}  # (A, G) of every call in this step
        self.sigma, self.p, self.moment, self.square = {}, {}, {}, {}
        self.column, self.bound, self.slow, self.growth = {}, {}, {}, {}
        self.step_count = 0
        for layer in self.layers:
            d = layer.in_features + (layer.bias is not None)
            self.sigma[layer] = (
                DenseSigma() if test_matrix is None else SubspaceSigma(test_matrix(d))
            )
            self.moment[layer] = torch.zeros(layer.out_features, d, dtype=torch.float64)
            self.square[layer], self.column[layer], self.bound[layer] = 0.0, 0.0, None
            self.slow[layer], self.growth[layer] = 0.0, 1.0
            layer.register_forward_hook(self.write_down)

    def write_down(self, layer, args, output):
        rows = with_ones(args[0].detach().reshape(-1, layer.in_features), layer)

        def write(gradient):
            self.seen[layer].append((rows, gradient.reshape(-1, layer.out_features)))

        output.register_hook(write)

    def step(self):
        step = self.step_count
        self.step_count += 1
        for layer in self.layers:
            calls, self.seen[layer] = self.seen[layer], []
            a = torch.cat([rows for rows, _ in calls])
            g = torch.cat([gradient for _, gradient in calls])
            if step == 0:
                self.sigma[layer].start(a)
                self.p[layer] = self.sigma[layer].inverse(self.damping, self.power)
                self.measure(layer)
            self.move(layer, g.T @ a, self.p[layer], step + 1)
            if step > 0 and step % self.curvature_every == 0:
                self.sigma[layer].commit(a, self.beta)
                self.p[layer] = self.sigma[layer].inverse(self.damping, self.power)
                self.measure(layer)
                self.grow(layer, step + 1)

    def scale_of(self, layer):
        head = layer is self.layers[-1] and not self.spectral_head
        return "factored" if self.normalize == "spectral" and head else self.normalize

    def grow(self, layer, t):
        if self.max_growth is None or self.scale_of(layer) in ("sgd", "none", "spectral"):
            return
        square = self.square[layer]
        if self.normalize == "adam":
            square = square[:, : layer.in_features]
        recent = (square.mean() / (1 - self.beta2**t)).item()
        weight = min(1.0, (1 - 0.999**self.curvature_every) / (1 - 0.999**t))
        weight = weight if self.slow[layer] else 1.0
        self.slow[layer] += weight * (recent - self.slow[layer])
        self.growth[layer] = min(max(1.0, (recent / self.slow[layer]) ** 0.5), self.max_growth)

    def measure(self, layer):
        rms = layer.weight.detach().square().mean().sqrt().item()
        self.bound[layer] = max(rms, (3 * self.moment[layer].shape[1]) ** -0.5)

    @torch.no_grad()
    def move(self, layer, gradient, p, t):
        direction, normalize = gradient @ p, self.scale_of(layer)
        self.moment[layer] = self.momentum * self.moment[layer] + (1 - self.momentum) * direction
        update = self.moment[layer] / (1 - self.momentum**t)
        if normalize in ("rms", "adam"):
            square = direction.square()
            square = square.mean() if normalize == "rms" else square
            self.square[layer] = self.beta2 * self.square[layer] + (1 - self.beta2) * square
            update = update / ((self.square[layer] / (1 - self.beta2**t)).sqrt() + self.eps)
        elif normalize in ("row", "factored", "spectral"):
            for squares, axis in ((self.square, 1), (self.column, 0)):
                mean = direction.square().mean(axis)
                squares[layer] = self.beta2 * squares[layer] + (1 - self.beta2) * mean
            square = self.square[layer][:, None]
            if normalize == "factored":
                square = square * self.column[layer] / self.square[layer].mean()
            update = update / ((square / (1 - self.beta2**t)).sqrt() + self.eps)
            if normalize == "spectral":
                size = layer.in_features
                nesterov = self.momentum * self.moment[layer] + (1 - self.momentum) * direction
                parts = nesterov[:, :size].chunk(self.split)
                update[:, :size] = torch.cat([spectral(part) for part in parts])
        elif normalize == "sgd":
            update = update * gradient.norm() / direction.norm()
        weight = layer.weight
        if layer.bias is not None:
            weight = torch.cat([layer.weight, layer.bias[:, None]], 1)
        lr = self.lr * self.growth[layer]
        if self.max_change is not None:
            bound = self.max_change * self.bound[layer]
            if normalize in ("sgd", "none"):
                bound = bound / update.square().mean().sqrt()
            if normalize == "spectral":
                bound = bound / 0.6
            if normalize in ("rms", "row", "factored", "adam"):
                bound = bound / max(1, (1 - self.momentum) / (1 - self.beta2) ** 0.5)
            lr = min(lr, bound)
        weight = weight * (1 - self.lr * self.weight_decay) - lr * update
        layer.weight.copy_(weight[:, : layer.in_features])
        if layer.bias is not None:
            layer.bias.copy_(weight[:, -1])
