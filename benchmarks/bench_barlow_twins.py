"""Barlow Twins, forward plus backward, beside eager PyTorch, torch.compile and the matmuls that nobody can avoid."""

import pytest
import torch
import torch.nn.functional as F
from _compare import record

import sslops


def eager(z_a: torch.Tensor, z_b: torch.Tensor) -> torch.Tensor:
    """As the authors' code: the matrix, its diagonal, and what is left of its squares."""
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
    c = a.t() @ b / len(z_a)
    diagonal = c.diagonal()
    return (diagonal - 1).square().sum() + 5e-3 * (c.square().sum() - diagonal.square().sum())


def step(loss, z_a, z_b):
    def run():
        z_a.grad = z_b.grad = None
        loss(z_a, z_b).backward()

    return run


def matmuls(z_a, z_b):
    """The route's matmuls on whole matrices: the limit of this algorithm on this machine."""
    n, d = z_a.shape
    a, b = z_a.detach(), z_b.detach()
    gram, c, out = torch.empty(n, n), torch.empty(0 if 4 * n < 3 * d else (d, d)), torch.empty(n, d)

    def gram_route():
        for x in (a, b):
            torch.mm(x, x.t(), out=gram)
            torch.mm(gram, x, out=out)

    def panels_route():
        torch.mm(a.t(), b, out=c)
        torch.mm(b, c.t(), out=out)
        torch.mm(a, c, out=out)

    return gram_route if 4 * n < 3 * d else panels_route


@pytest.mark.parametrize(("n", "d"), [(256, 8192), (1024, 8192), (4096, 2048)])
def test_forward_and_backward(benchmark, threads, n, d):
    z_a, z_b = (torch.randn(n, d, requires_grad=True) for _ in range(2))
    variants = {
        "sslops": step(lambda a, b: sslops.barlow_twins(a, b, backend="cpu"), z_a, z_b),
        "matmuls": matmuls(z_a, z_b),
        "eager": step(eager, z_a, z_b),
        "compile": step(torch.compile(eager, dynamic=False), z_a, z_b),
    }
    torch._dynamo.reset()
    record(benchmark, variants, n=n, d=d, dtype="float32", flop=min(8 * n * n * d, 6 * n * d * d))
