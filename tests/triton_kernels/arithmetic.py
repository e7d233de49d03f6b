"""Tests of gpu_arithmetic.py by known numbers; test_interpreter.py starts them in a process of their own."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

BF16 = torch.bfloat16


@triton.jit
def _round_trip(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def _multiply(a, b, c, d, N: tl.constexpr):
    """c = a b, and d = the same as a kernel's next operand"""
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    out = tl.dot(tl.load(a + i * N + j), tl.trans(tl.load(b + i * N + j)))
    tl.store(c + i * N + j, out)
    tl.store(d + i * N + j, tl.dot(out.to(a.dtype.element_ty), tl.load(b + i * N + j)))


@triton.jit
def _elementwise(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, tl.where(a < b, a * b + a, tl.abs(b) - a))


@triton.jit
def _approximate(x, powers, quotients, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    tl.store(powers + i, tl.exp2(a))
    tl.store(quotients + i, 1.0 / a)


def test_every_bf16_number_comes_back() -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16)
    y = torch.zeros(2**16)
    _round_trip[(1,)](x, y, 2**16)
    torch.testing.assert_close(y, x.float(), rtol=0, atol=0, equal_nan=True)
    z = torch.zeros_like(x)
    _round_trip[(1,)](y, z, 2**16)
    torch.testing.assert_close(z, x, rtol=0, atol=0, equal_nan=True)


def test_stores_round_to_nearest_even() -> None:
    """As torch rounds: ties, a carry into the exponent, subnormal numbers, past the largest"""
    bits = torch.randint(-(2**31), 2**31, (2**16,), dtype=torch.int64)
    bits[: 2**14] = bits[: 2**14] // 2**16 * 2**16 + 2**15  # ties
    bits[-4:] = torch.tensor([0x3FFFFFFF, 0x007FFFFF, 0x7F7FFFFF, 0x7F7F8000])
    x = bits.to(torch.int32).view(torch.float32)
    y = torch.zeros(len(x), dtype=BF16)
    _round_trip[(1,)](x, y, len(x))
    torch.testing.assert_close(y, x.to(BF16), rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(y.nan_to_num(), (bits.to(torch.int32) >> 16 << 16).view(torch.float32).to(BF16).nan_to_num())


@pytest.mark.parametrize("integers", [True, False])
def test_products(integers: bool) -> None:
    """Of small integers, where nothing is rounded before the result is; and of any numbers"""
    n = 64
    a, b = (torch.randint(-8, 9, (n, n)).to(BF16) if integers else torch.randn(n, n).to(BF16) for _ in range(2))
    c, d = torch.zeros(n, n), torch.zeros(n, n)
    _multiply[(1,)](a, b, c, d, n)
    expected = a.double() @ b.double().t()
    close = {"rtol": 0, "atol": 0 if integers else 1e-5}
    torch.testing.assert_close(c.double(), expected, **close)
    torch.testing.assert_close(d.double(), c.to(BF16).double() @ b.double(), rtol=0, atol=0 if integers else 1e-4)


def test_products_add_in_the_order_of_k() -> None:
    """Fused, and the same bits whatever the other rows are"""
    n = 64
    a, b = torch.randn(2, n, n)
    c, d = torch.zeros(2, n, n)
    _multiply[(1,)](a, b, c, d, n)
    expected = np.zeros((n, n), np.float32)
    for k in range(n):
        expected = (expected + a[:, k, None].double().numpy() * b[:, k].double().numpy()).astype(np.float32)
    assert torch.equal(c, torch.from_numpy(expected))
    _multiply[(1,)](b, a, d, torch.zeros(n, n), n)
    assert torch.equal(d, c.t())


def test_arithmetic_rounds_each_result() -> None:
    x, y = torch.randn(2, 1024).to(BF16)
    out = torch.zeros_like(x)
    _elementwise[(1,)](x, y, out, 1024)
    assert torch.equal(out, torch.where(x < y, x * y + x, y.abs() - x))


def ulps(got: Tensor, exact: Tensor) -> Tensor:
    return (got.double() - exact) / torch.from_numpy(np.spacing(exact.float().numpy())).double().abs()


def test_approximations_are_as_far_off_as_a_chips_may_be() -> None:
    x = torch.linspace(-90, 90, 4096)
    powers, quotients = torch.zeros_like(x), torch.zeros_like(x)
    _approximate[(1,)](x, powers, quotients, 4096)
    for got, exact in ((powers, x.double().exp2()), (quotients, 1 / x.double())):
        off = ulps(got, exact)
        assert 2 < off.abs().max() <= 2.51  # half an ulp to the float32 next to it
        assert abs(off.mean()) < 0.1
    again = torch.zeros_like(x)
    _approximate[(1,)](x, again, quotients, 4096)
    assert torch.equal(again, powers)
    edges = torch.tensor([0.0, -torch.inf, torch.inf, torch.nan, -127.0, 200.0, 1.0, -1.0])
    powers, quotients = torch.zeros_like(edges), torch.zeros_like(edges)
    with np.errstate(divide="ignore"):
        _approximate[(1,)](edges, powers, quotients, 8)
    assert powers[:3].tolist() == [1, 0, torch.inf]
    assert powers[3].isnan()
    assert powers[4:6].tolist() == [0, torch.inf]
    assert quotients[:3].tolist() == [torch.inf, 0, 0]


@triton.jit
def _exact(a, b, c, K: tl.constexpr, PRECISION: tl.constexpr):
    """c [16, 16] = a b^T of [16, K] each"""
    i, j, k = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :], tl.arange(0, K)[None, :]
    product = tl.dot(tl.load(a + i * K + k), tl.trans(tl.load(b + i * K + k)), input_precision=PRECISION)
    tl.store(c + i * 16 + j, product)


def exact(a: Tensor, b: Tensor, precision: str = "tf32x3") -> Tensor:
    c = torch.zeros(16, 16)
    _exact[(1,)](a, b, c, a.shape[1], precision)
    return c


def test_three_products_of_tf32() -> None:
    """Two parts of 11 bits are 1 + 3 / 2^13; 9 / 2^26, small by small, is left out, whatever the magnitudes are"""
    x, y = torch.zeros(2, 16, 16)
    sizes = torch.tensor([1.0, -1.0, 2.0**100, 2.0**-100, 0.0])
    x[:5, 3], y[:, 3] = sizes * (1 + 3 / 2**13), 1 + 3 / 2**13
    assert torch.equal(exact(x, y)[:5, 0], sizes * (1 + 3 / 2**12))
    assert torch.equal(exact(x, y, "ieee")[:5, 0], sizes * (1 + 3 / 2**12 + 2.0**-23))
    integers = torch.randint(-1000, 1001, (2, 16, 16)).float()
    assert torch.equal(exact(*integers), integers[0] @ integers[1].t())


def test_three_products_cut_off_what_the_units_do() -> None:
    """Sixteen terms, four at a time: what is below 2^-24 of the largest, and what is below 2^-23 of their sum"""
    x = torch.full((16, 16), 1.5 * 2**-24)
    x[:, 0] = 1
    x[1] *= -1
    found = exact(x, torch.ones(16, 16))[:2, 0]
    assert found.tolist() == [1 + 7 * 2.0**-23, -1 - 7 * 2.0**-23]
    assert exact(x, torch.ones(16, 16), "ieee")[0, 0] == 1 + 15 * 2.0**-23


def test_three_products_keep_infinities_and_nans() -> None:
    x, y = torch.ones(2, 16, 16)
    x[0, 5], x[1, 5], x[2, 5], x[3, 5], x[3, 6] = torch.inf, -torch.inf, torch.nan, torch.inf, -torch.inf
    x[4], x[5] = 3e38, 1 + 3 / 2**13
    y[1, 5] = 0
    found = exact(x, y)
    assert found[0, 0] == torch.inf
    assert found[1, 0] == -torch.inf
    assert found[4, 0] == torch.inf
    assert found[(2, 3, 0), (0, 0, 1)].isnan().all()
    assert found[5:7, 0].tolist() == [16 + 3 / 2**9, 16]


def test_three_products_are_as_exact_as_float32_where_columns_are_few() -> None:
    """Of unit rows that are alike: what is cut off has one sign"""

    def error(columns: int, precision: str) -> Tensor:
        rows = torch.nn.functional.normalize(torch.ones(16, columns) + 0.3 * torch.randn(64, 16, columns), dim=-1)
        return (
            torch.stack([(exact(x, y, precision) - x.double() @ y.double().t()) for x, y in rows.view(32, 2, 16, -1)])
            .square()
            .mean()
            .sqrt()
        )

    assert error(16, "tf32x3") < error(128, "ieee")
    assert error(128, "tf32x3") > 3 * error(128, "ieee")
