"""The native core by itself: instruction sets, float16 in integers, threads."""

import pytest
import torch

from sslops import _C


def through_the_core(x: torch.Tensor, operand: int) -> torch.Tensor:
    """x [256, 256] as a kernel loads it, rounded to the operand's dtype"""
    out, inv_norm = torch.empty(256, 256), torch.empty(256)
    code = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[x.dtype]
    _C.embeddings_normalize(x.data_ptr(), code, 256, 256, False, operand, out.data_ptr(), inv_norm.data_ptr())
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_is_read(isa, dtype):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    torch.testing.assert_close(through_the_core(every, 0), every.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "code"), [(torch.float16, 1), (torch.bfloat16, 2)])
def test_rounding_to_half_precision(isa, dtype, code):
    """Against torch: any bits, and the points halfway between neighbours, where ties go to even."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    above = torch.nextafter(every, torch.tensor(float("inf"), dtype=dtype))
    halfway = (every.double() / 2 + above.double() / 2).float()
    anything = torch.randint(-(2**31), 2**31 - 1, (256, 256)).to(torch.int32).view(torch.float32)
    for x in (halfway, anything):
        torch.testing.assert_close(through_the_core(x, code), x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_build_info():
    info = _C.build_info()
    assert info["threads"] == "torch"
    assert info["isa"] in info["isas"].split(",")
    with pytest.raises(ValueError, match="unknown instruction set"):
        _C.set_isa("mmx")
