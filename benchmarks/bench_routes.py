"""The route that the losses on columns take beside both: neither should be faster by a tenth. Shapes: N x D."""

from functools import partial

import pytest

import sslops

from ._compare import cases, record
from ._views import variant, views

GRID = """
    64x256 256x256 1024x256 128x1024 512x1024 768x1024 1024x1024 1365x1024 2048x1024 4096x1024
    256x2048 1024x2048 1536x2048 2048x2048 2730x2048 256x8192 1024x8192
"""
CASES = {
    "cpu": cases(GRID, "float32", "both"),
    "cuda": cases(GRID, "bfloat16", "both"),
    "small": cases("66x7 130x300", "float32", "both"),
}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("op", [sslops.barlow_twins, sslops.vicreg])
def test_routes(benchmark, device, case, op):
    (n, d), dtype, part = case
    inputs = views(n, d, dtype, device)
    losses = {"sslops": op, **{route: partial(op, route=route) for route in ("gram", "panels")}}
    variants = {name: variant(loss, *inputs, part) for name, loss in losses.items()}
    record(benchmark, variants, op=op.__name__, n=n, d=d, dtype=dtype, part=part)
