"""NT-Xent, forward plus backward, beside eager PyTorch, torch.compile and the matmuls that nobody can avoid."""

import pytest
import torch
import torch.nn.functional as F
from _compare import peak_memory, record

import sslops
from sslops.kernels.cpu.tiles import tiles_for, upper_tiles

TEMPERATURE, D = 0.1, 128


def usual_eager(z0: torch.Tensor, z1: torch.Tensor) -> torch.Tensor:
    """As training scripts have it: one [2N, 2N] matrix and a cross entropy."""
    z = F.normalize(torch.cat([z0, z1]))
    n = len(z0)
    logits = (z @ z.t() / TEMPERATURE).float()
    logits.fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def lean_eager(z0: torch.Tensor, z1: torch.Tensor) -> torch.Tensor:
    """The fewest passes over the matrix that we found: the temperature in the operands, logsumexp, positives apart."""
    z = F.normalize(torch.cat([z0, z1])) * TEMPERATURE**-0.5
    positives = (z[: len(z0)].float() * z[len(z0) :].float()).sum(1)
    logits = (z @ z.t()).float()
    logits.fill_diagonal_(float("-inf"))
    return logits.logsumexp(1).mean() - positives.mean()


def step(loss, z0, z1):
    def run():
        z0.grad = z1.grad = None
        loss(z0, z1).backward()

    return run


def tile_matmuls(z0, z1):
    """The same tiles without anything between the matmuls: the limit of this algorithm on this machine."""
    with torch.no_grad():
        z = F.normalize(torch.cat([z0, z1]).float())
    tiles = tiles_for(z, z0.dtype)

    def run():
        for i, j in upper_tiles(len(z)):
            tiles.logits(i, j)
        dz = tiles.zeros()
        for i, j in upper_tiles(len(z)):
            tiles.add_symmetric(dz, i, j, tiles.logits(i, j))

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("m", [512, 4096, 8192, 16384])
def test_forward_and_backward(benchmark, threads, m, dtype):
    z0, z1 = (torch.randn(m // 2, D).to(dtype).requires_grad_() for _ in range(2))
    variants = {
        "sslops": step(lambda a, b: sslops.nt_xent(a, b, temperature=TEMPERATURE, backend="cpu"), z0, z1),
        "tile matmuls": tile_matmuls(z0, z1),
        "eager": step(usual_eager, z0, z1),
        "lean eager": step(lean_eager, z0, z1),
        "compile": step(torch.compile(usual_eager, dynamic=False), z0, z1),
        "lean compile": step(torch.compile(lean_eager, dynamic=False), z0, z1),
    }
    torch._dynamo.reset()
    record(benchmark, variants, m=m, d=D, dtype=str(dtype), flop=4 * m * m * D)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_65536_rows(benchmark, dtype):
    setup = f"""
import sslops, torch
z0, z1 = (torch.randn(32768, {D}).to(torch.{dtype}).requires_grad_() for _ in range(2))
sslops.nt_xent(z0[:600], z1[:600]).backward()
"""
    mb = peak_memory(setup, "sslops.nt_xent(z0, z1, backend='cpu').backward()")
    benchmark.extra_info.update(peak_mb={"sslops": mb}, eager_matrix_mb=65536**2 * 4 / 2**20)
    benchmark.pedantic(lambda: None, rounds=1)
    assert mb < 256
