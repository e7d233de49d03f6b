"""The native core by itself: instruction sets, float16 in integers, threads."""

import pytest
import torch

import sslops
from sslops import _C


def through_the_core(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [256, 256] as a kernel loads it and stores it again, in float32 in between"""
    ids = torch.zeros(1, 1, dtype=torch.int64)
    return sslops.gather_patches(x[None, None], ids, 256, dtype=dtype, backend="cpu").view(256, 256)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_is_read(isa, dtype):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    torch.testing.assert_close(through_the_core(every, torch.float32), every.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_half_precision(isa, dtype):
    """Against torch: any bits, and the points halfway between neighbours, where ties go to even."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    above = torch.nextafter(every, torch.tensor(float("inf"), dtype=dtype))
    halfway = (every.double() / 2 + above.double() / 2).float()
    anything = torch.randint(-(2**31), 2**31 - 1, (256, 256)).to(torch.int32).view(torch.float32)
    for x in (halfway, anything):
        torch.testing.assert_close(through_the_core(x, dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_build_info():
    info = _C.build_info()
    assert info["threads"] == "torch"
    assert info["isa"] in info["isas"].split(",")
    with pytest.raises(ValueError, match="unknown instruction set"):
        _C.set_isa("mmx")
