"""NT-Xent on the CPU: symmetric tiles in both directions, 4 M^2 D FLOP, nothing of size M x M.

For a part of the batch, `own`, its rows against all columns: 6 FLOP a pair of rows and column, forward and backward.

r_i = sum over j != i of exp((s_ij - m_i) / tau), m_i the maximum; p_ij = exp((s_ij - m_i) / tau) / r_i.
Forward: each tile above the diagonal adds to r of its rows and of its columns.
Backward: W_ij = p_ij g_i + p_ji g_j is symmetric, dz = (W z - positives) / tau: a tile adds to both its blocks of dz.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sslops import _C

from .tiles import DTYPE_CODES, FLOAT32, refuses, row_tiles, softmax_scale, tiles_for, upper_tiles  # noqa: F401


def _normalize(z0: Tensor, z1: Tensor, normalize: bool, operand: torch.dtype) -> tuple[Tensor, Tensor]:
    n, d = z0.shape
    z, inv_norm = torch.empty(2 * n, d, **FLOAT32), torch.empty(2 * n, **FLOAT32)
    _C.nt_xent_normalize(
        z0.data_ptr(), z1.data_ptr(), DTYPE_CODES[z0.dtype], n, d, normalize, DTYPE_CODES[operand],
        z.data_ptr(), inv_norm.data_ptr(),
    )  # fmt: skip
    return z, inv_norm


def _tiles(n: int, own: slice | None) -> Iterator[tuple[slice, slice]]:
    if own is None:
        yield from upper_tiles(2 * n)
    else:
        for view in (0, n):
            yield from row_tiles(slice(view + own.start, view + own.stop), 2 * n)


def forward(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor,
    normalize: bool,
    compute_dtype: torch.dtype,
    count_exceeding: bool = False,
    own: slice | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """losses [2B] and stats [3 or 5, 2B] of the B examples `own`, by default all; inv_norm [2N]"""
    n = len(z0)
    first, count = (0, n) if own is None else (own.start, own.stop - own.start)
    tau, fixed = softmax_scale(temperature, normalize)
    z, inv_norm = _normalize(z0, z1, normalize, compute_dtype)
    maximum = torch.full((2 * n,), torch.finfo(torch.float32).min, **FLOAT32)
    r, s_pos = torch.zeros(2 * n, **FLOAT32), torch.empty(n, **FLOAT32)
    tiles = tiles_for(z, compute_dtype)
    if count_exceeding:
        positives, above = (z[:n] * z[n:]).sum(1).repeat(2), torch.zeros(2 * n, **FLOAT32)
    for i, j in _tiles(n, own):
        s = tiles.logits(i, j)
        tile = (s.data_ptr(), s.stride(0), *s.shape, i.start, j.start, n, own is None and i != j)
        _C.nt_xent_forward_tile(*tile, tau, fixed, maximum.data_ptr(), r.data_ptr(), s_pos.data_ptr())
        if count_exceeding:
            _C.nt_xent_count_tile(*tile, positives.data_ptr(), above.data_ptr())
    losses, stats = torch.empty(2 * count, **FLOAT32), torch.empty(5 if count_exceeding else 3, 2 * count, **FLOAT32)
    _C.nt_xent_finish_forward(
        n, first, count, tau, fixed, maximum.data_ptr(), r.data_ptr(), s_pos.data_ptr(),
        losses.data_ptr(), stats.data_ptr(),
    )  # fmt: skip
    if count_exceeding:
        stats[3:].view(2, 2, count)[:] = torch.stack([positives, above]).view(2, 2, n)[..., first : first + count]
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
    own: slice | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz0, dz1 [B, D] of the examples `own` in the inputs' dtype and their share of dtemperature

    From grad [2N] float32 and stats [3 or 5, 2N], those of all examples.
    """
    n, d = z0.shape
    first, count = (0, n) if own is None else (own.start, own.stop - own.start)
    tau, fixed = softmax_scale(temperature, normalize)
    z, _ = _normalize(z0, z1, normalize, compute_dtype)
    maximum, weights = stats[0], grad * stats[1]
    tiles = tiles_for(z, compute_dtype)
    dz = tiles.zeros()
    for i, j in _tiles(n, own):
        s = tiles.logits(i, j)
        _C.nt_xent_backward_tile(
            s.data_ptr(), s.stride(0), *s.shape, i.start, j.start, n, tau, fixed, maximum.data_ptr(), weights.data_ptr()
        )
        tiles.add_symmetric(dz, i, j, s, "both" if own is None else "left")
    dz0, dz1, dots = z0.new_empty(count, d), z1.new_empty(count, d), torch.empty(2 * count, **FLOAT32)
    _C.nt_xent_finish_backward(
        z0.data_ptr(), z1.data_ptr(), DTYPE_CODES[z0.dtype], n, first, count, d, normalize, tau,
        grad.data_ptr(), z.data_ptr(), inv_norm.data_ptr(), stats.data_ptr(), dz.data_ptr(), dz.stride(0),
        dz0.data_ptr(), dz1.data_ptr(), dots.data_ptr(),
    )  # fmt: skip
    # dL/d(1/tau) = (tau / 2) sum_i <z_i, dz_i>
    return dz0, dz1, dots.sum() * (-0.5 / tau)
