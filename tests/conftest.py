import os

import pytest
import torch

from sslops import _C

if instructions := os.environ.get("SSLOPS_TEST_ISA"):  # all tests by another instruction set than the best one
    _C.set_isa(instructions)

LONG = ("cuda_emulation", "triton_kernels", "test_wheel", "test_distributed", "test_pretrain")


def pytest_collection_modifyitems(items):
    """The long files first: whatever comes last, one worker alone is busy with it."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONG))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["portable", "avx2", "avx512", "amx"])
def isa(request):
    """Each instruction set that this machine has, in force for the test."""
    best = _C.isa()
    try:
        _C.set_isa(request.param)
    except ValueError as missing:
        pytest.skip(str(missing))
    yield request.param
    _C.set_isa(best)
