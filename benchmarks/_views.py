"""What the benchmarks of the losses on two [N, D] views share: shapes are N x D."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ._compare import Case, Variant, matmul, peak_memory, record, record_memory, settings

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def views(n: int, d: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    return [torch.randn(n, d, device=device).to(dtype).requires_grad_() for _ in range(2)]


def variant(loss: Loss, z_a: torch.Tensor, z_b: torch.Tensor, part: str) -> Variant:
    def forward() -> torch.Tensor:
        z_a.grad = z_b.grad = None
        return loss(z_a, z_b).sum()

    both = {"forward": forward, "backward": (forward, torch.Tensor.backward), "both": lambda: forward().backward()}
    return both[part]


def products(n: int, d: int, gram: bool, forward: int, backward: int) -> Variant:
    """So many matmuls of the gram route (2 N^2 D FLOP, half in forward) or of the panels route (2 N D^2)."""
    a = torch.randn(n, d)
    square = torch.randn(n, n) if gram else torch.randn(d, d)
    out = torch.empty(n, d)

    def run() -> None:
        for _ in range(forward):
            for rows in range(0, n, 128) if gram else ():
                square[rows : rows + 128, rows:].addmm_(a[rows : rows + 128], a[rows:].t(), beta=0)
            if not gram:
                torch.mm(a.t(), a, out=square)
        for _ in range(backward):
            torch.mm(square, a, out=out) if gram else torch.mm(a, square, out=out)

    return run


def time_row(
    benchmark: Any, case: Case, device: str, losses: Mapping[str, Loss], limit: Variant | None, flop: float
) -> None:
    (n, d), dtype, part = case
    z_a, z_b = views(n, d, dtype, device)
    variants = {name: variant(loss, z_a, z_b, part) for name, loss in losses.items()}
    variants["matmuls"] = limit if limit and device == "cpu" else matmul(flop, dtype, device)
    record(benchmark, variants, limit="matmuls", n=n, d=d, dtype=dtype, part=part, flop=flop)


def memory_row(benchmark: Any, case: Case, module: str, names: list[str]) -> None:
    """Of a step on the CPU; `module` has a function `losses`."""
    (n, d), dtype, _ = case
    setup = f"""
import torch
from benchmarks._views import variant, views
from benchmarks.{module} import losses
z_a, z_b = views({n}, {d}, {dtype}, "cpu")
step = variant(losses({d}, "cpu")[{{!r}}], z_a, z_b, "both")
"""
    asked = names[:1] if settings.only_ours else names
    peak_mb = {name: peak_memory(setup.format(name), "step()") for name in asked}
    record_memory(benchmark, peak_mb, n=n, d=d, dtype=dtype)
