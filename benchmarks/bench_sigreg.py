"""SIGReg beside eager forms, torch.compile and lightly. Shapes: V x N x D x M, along M directions."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import sslops

from ._compare import Variant, cases, peak_memory, record, record_memory, settings
from .peers import lightly_loss

KNOTS, T_MAX = 17, 3.0
CASES = {
    "cpu": [
        *cases("8x128x64x1024 8x512x64x1024 8x256x128x256", "float32", "both"),
        *cases("8x128x64x1024", "float32", "memory"),
    ],
    "cuda": cases("8x128x64x1024 8x512x64x1024", "float32", "both"),
    "small": cases("2x6x5x7 3x70x20x130", "float32 bfloat16", "both"),
}


def knots(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """t, the normal distribution's characteristic function there, and the weights of the integral"""
    t = torch.linspace(0, T_MAX, KNOTS, device=z.device)
    weights = torch.full_like(t, 2 * T_MAX / (KNOTS - 1))
    weights[[0, -1]] /= 2
    phi = (-t.square() / 2).exp()
    return t, phi, weights * phi


def eager(z: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """As the authors' code and lightly's have it"""
    t, phi, weights = knots(z)
    phases = (z.float() @ directions.t())[..., None] * t
    apart = (phases.cos().mean(1) - phi).square() + phases.sin().mean(1).square()
    return (apart @ weights).mean() * z.shape[1]


def rotations(z: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """The fewest transcendentals: one sine and cosine, and a rotation for each knot"""
    t, phi, weights = knots(z)
    phases = (z.float() @ directions.t()) * t[1]
    first = c, s = phases.cos(), phases.sin()
    total = 0
    for k in range(1, KNOTS):
        total = total + weights[k] * ((c.mean(1) - phi[k]).square() + s.mean(1).square()).mean()
        c, s = c * first[0] - s * first[1], s * first[0] + c * first[1]
    return total * z.shape[1]


def fused(z: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    return sslops.sigreg(z, slices=len(directions), knots=KNOTS, t_max=T_MAX)  # draws its own, as lightly does


def losses(m: int) -> dict[str, Callable]:
    found = {
        "sslops": fused,
        "eager": eager,
        "rotations": rotations,
        "compile": torch.compile(eager, dynamic=False),
        "rotations compile": torch.compile(rotations, dynamic=False),
    }
    if theirs := lightly_loss("SIGReg", knots=KNOTS, t_max=T_MAX, num_vectors=m):
        found["lightly"] = lambda z, directions: theirs(z)
    return found


def variant(loss: Callable, z: torch.Tensor, directions: torch.Tensor) -> Variant:
    def step() -> None:
        z.grad = None
        loss(z, directions).backward()

    return step


def inputs(v: int, n: int, d: int, m: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.randn(v, n, d, device=device).to(dtype).requires_grad_()
    return z, F.normalize(torch.randn(m, d, device=device))


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    (v, n, d, m), dtype, _ = case
    z, directions = inputs(v, n, d, m, dtype, device)
    torch._dynamo.reset()
    variants = {name: variant(loss, z, directions) for name, loss in losses(m).items()}
    rows = z.detach().float().flatten(0, 1)
    u, out = torch.empty(v * n, m, device=device), torch.empty_like(rows)

    def matmuls() -> None:
        for _ in range(2):  # the projections, again for the gradient
            torch.mm(rows, directions.t(), out=u)
        torch.mm(u, directions, out=out)

    variants["matmuls"] = matmuls
    record(benchmark, variants, limit="matmuls", v=v, n=n, d=d, m=m, dtype=dtype, flop=6 * v * n * d * m)


def test_memory(benchmark, device, case):
    (v, n, d, m), dtype, _ = case
    setup = f"""
import torch
from benchmarks.bench_sigreg import inputs, losses, variant
step = variant(losses({m})[{{!r}}], *inputs({v}, {n}, {d}, {m}, {dtype}, "cpu"))
"""
    names = [name for name in ("sslops", "eager", "rotations", "compile", "lightly") if name in losses(m)]
    names = names[:1] if settings.only_ours else names
    peak_mb = {name: peak_memory(setup.format(name), "step()") for name in names}
    record_memory(benchmark, peak_mb, v=v, n=n, d=d, m=m, dtype=dtype)
