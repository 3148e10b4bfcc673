"""subspace.cuh, emulated, against gls_fused.reference in float32, on whose rounding nu rests."""

import pytest
import torch
from cuda_emulation.emulator import Emulator
from tolerances import PRODUCT, SOLVE, assert_near

from gls_fused import reference


@pytest.fixture(scope="module")
def emulator():
    return Emulator("drivers/subspace.cpp", ["subspace_kernels.cu"])


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def make_layer(dim, rank, scale=1.0):
    """A core and a sketch of one Sigma: U' Sigma U, Sigma U."""
    root = draw(dim, dim + 3, seed=1)
    sigma = scale * root @ root.T
    basis = torch.linalg.qr(draw(dim, rank))[0]
    return (basis.T @ sigma @ basis).float(), (sigma @ basis).float()


def move(emulator, layers):
    """The basis [d, r] and the core of every layer, in one call."""

    def run(memory):
        emulator.call("start_moves")
        results = []
        for core, sketch in layers:
            dim, rank = sketch.shape
            basis = memory.poison("basis", (rank, dim), torch.float32)
            core_out = memory.poison("core_out", (rank, rank), torch.float32)
            blocks = -(-dim // 128)
            emulator.call(
                "add_move", memory.copy("sketch", sketch.T), memory.copy("core", core),
                memory.poison("rough", (rank, dim), torch.float32), basis, core_out,
                memory.poison("parts", (blocks, rank, rank), torch.float64),
                memory.poison("triangles", (3, rank, rank), torch.float64), dim, rank,
            )  # fmt: skip
            results += (basis, core_out)
        emulator.call("move")
        return results

    found = emulator.run_in_every_order(run)
    return [(u.T, m) for u, m in zip(found[::2], found[1::2], strict=True)]


def check(emulator, layers):
    for (basis, core), layer in zip(move(emulator, layers), layers, strict=True):
        # U+ and M+ are unique up to signs; U+ M+ U+' is unique.
        u, m = (x.double() for x in reference.refresh_subspace(*layer))
        wide = basis.double()
        assert_near(wide @ core.double() @ wide.T, u @ m @ u.T, SOLVE[torch.float32])
        identity = torch.eye(len(core), dtype=torch.float64)
        assert_near(wide.T @ wide, identity, PRODUCT[torch.float32])
        assert torch.equal(core, core.T)


def test_layers_of_all_sizes_together(emulator):
    sizes = [(1, 1), (3, 2), (33, 9), (128, 16), (129, 17), (300, 33), (70, 64)]
    check(emulator, [make_layer(*size) for size in sizes])


def test_more_layers_than_a_table_holds(emulator):
    # 32, some of several blocks.
    check(emulator, [make_layer(130 if i % 8 == 7 else 3 + i, 1 + i % 3) for i in range(40)])


@pytest.mark.parametrize("scale", [1e-20, 1e12])
def test_scales(emulator, scale):
    check(emulator, [make_layer(40, 6, scale)])


def test_rank_equal_to_dim(emulator):
    check(emulator, [make_layer(7, 7)])


@pytest.mark.parametrize("rank_of_sketch", [0, 1, 3])
def test_dependent_columns_leave_an_orthonormal_basis(emulator, rank_of_sketch):
    dim, rank = 50, 6
    root = draw(dim, rank_of_sketch)
    basis = torch.linalg.qr(draw(dim, rank, seed=2))[0]
    half = root.T @ basis
    core, sketch = (half.T @ half).float(), (root @ half).float()
    ((found, moved),) = move(emulator, [(core, sketch)])
    wide = found.double()
    assert_near(wide.T @ wide, torch.eye(rank, dtype=torch.float64), PRODUCT[torch.float32])
    # Nystrom's approximation of a Sigma of no greater rank is Sigma.
    assert_near(wide @ moved.double() @ wide.T, root @ root.T, SOLVE[torch.float32])
