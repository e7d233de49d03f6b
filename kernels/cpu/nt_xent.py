"""NT-Xent on the CPU: symmetric tiles in both directions, 4 M^2 D FLOP, nothing of size M x M.

r_i = sum over j != i of exp((s_ij - m_i) / tau), m_i the maximum; p_ij = exp((s_ij - m_i) / tau) / r_i.
Forward: each tile above the diagonal adds to r of its rows and of its columns.
Backward: W_ij = p_ij g_i + p_ji g_j is symmetric, dz = (W z - positives) / tau: a tile adds to both its blocks of dz.
"""

import torch
from torch import Tensor

from sslops import _C

from .tiles import DTYPE_CODES, FLOAT32, refuses, tiles_for, upper_tiles  # noqa: F401

# Below this temperature the maximum is tracked, which costs a second exponential per pair. Above it, with 1 for the
# maximum, no sum of exp((s - 1) / tau) is below exp(-43): half of float32's range, the other half being for grad / r.
# (|s| is at most 1.01, whatever rounding did to unit rows.)
LOWEST_FIXED_MAXIMUM_TEMPERATURE = 2.02 / 43


def _normalize(z0: Tensor, z1: Tensor, normalize: bool, operand: torch.dtype) -> tuple[Tensor, Tensor]:
    n, d = z0.shape
    z, inv_norm = torch.empty(2 * n, d, **FLOAT32), torch.empty(2 * n, **FLOAT32)
    _C.nt_xent_normalize(
        z0.data_ptr(), z1.data_ptr(), DTYPE_CODES[z0.dtype], n, d, normalize, DTYPE_CODES[operand],
        z.data_ptr(), inv_norm.data_ptr(),
    )  # fmt: skip
    return z, inv_norm


def _scale(temperature: float | Tensor, normalize: bool) -> tuple[float, bool]:
    """tau (NaN if not positive: it makes everything NaN) and whether the maximum of s is taken to be 1"""
    tau = float(temperature)
    return (tau if tau > 0 else torch.nan), normalize and tau >= LOWEST_FIXED_MAXIMUM_TEMPERATURE


def forward(
    z0: Tensor, z1: Tensor, temperature: float | Tensor, normalize: bool, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """losses [2N], inv_norm [2N], stats [3, 2N] (see csrc/cpu/nt_xent.h)"""
    n = len(z0)
    tau, fixed = _scale(temperature, normalize)
    z, inv_norm = _normalize(z0, z1, normalize, compute_dtype)
    maximum = torch.full((2 * n,), torch.finfo(torch.float32).min, **FLOAT32)
    r, s_pos = torch.zeros(2 * n, **FLOAT32), torch.empty(n, **FLOAT32)
    tiles = tiles_for(z, compute_dtype)
    for i, j in upper_tiles(2 * n):
        s = tiles.logits(i, j)
        _C.nt_xent_forward_tile(
            s.data_ptr(), s.stride(0), *s.shape, i.start, j.start, n, tau, fixed,
            maximum.data_ptr(), r.data_ptr(), s_pos.data_ptr(),
        )  # fmt: skip
    losses, stats = torch.empty(2 * n, **FLOAT32), torch.empty(3, 2 * n, **FLOAT32)
    _C.nt_xent_finish_forward(
        n, tau, fixed, maximum.data_ptr(), r.data_ptr(), s_pos.data_ptr(), losses.data_ptr(), stats.data_ptr()
    )
    return losses, inv_norm, stats


def backward(
    grad: Tensor,
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor,
    normalize: bool,
    compute_dtype: torch.dtype,
    inv_norm: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz0, dz1 [N, D] in the inputs' dtype and dtemperature, from grad [2N] float32"""
    n, d = z0.shape
    tau, fixed = _scale(temperature, normalize)
    z, _ = _normalize(z0, z1, normalize, compute_dtype)
    maximum, weights = stats[0], grad * stats[1]
    tiles = tiles_for(z, compute_dtype)
    dz = tiles.zeros()
    for i, j in upper_tiles(2 * n):
        s = tiles.logits(i, j)
        _C.nt_xent_backward_tile(
            s.data_ptr(), s.stride(0), *s.shape, i.start, j.start, n, tau, fixed, maximum.data_ptr(), weights.data_ptr()
        )
        tiles.add_symmetric(dz, i, j, s)
    dz0, dz1, dots = torch.empty_like(z0), torch.empty_like(z1), torch.empty(2 * n, **FLOAT32)
    _C.nt_xent_finish_backward(
        z0.data_ptr(), z1.data_ptr(), DTYPE_CODES[z0.dtype], n, d, normalize, tau,
        grad.data_ptr(), z.data_ptr(), inv_norm.data_ptr(), stats.data_ptr(), dz.data_ptr(), dz.stride(0),
        dz0.data_ptr(), dz1.data_ptr(), dots.data_ptr(),
    )  # fmt: skip
    # dL/d(1/tau) = (tau / 2) sum_i <z_i, dz_i>
    return dz0, dz1, dots.sum() * (-0.5 / tau)
