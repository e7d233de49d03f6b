"""RELIC on the CPU: nothing of size B x B. Rows of online and target lie in one matrix z, S = online target^T.

A tile of S and the tile of S^T at the same place hold what a row needs, its a and its b; and, with their roles changed,
what the rows do that the columns stand for. All others as negatives: the tiles on and above the diagonal, 2 B^2 D FLOP
forward and 4 B^2 D backward (6 with the target's gradient). Few negatives: only the tiles of their band.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sslops import _C

from .tiles import DTYPE_CODES, FLOAT32, TILE, Bf16Tiles, Float32Tiles, padded, refuses, tiles_for, upper_tiles  # noqa: F401

# As in NT-Xent: sums of exp((s - 1) / tau) use half of float32's range, above this temperature.
LOWEST_FIXED_MAXIMUM_TEMPERATURE = 2.02 / 43


def _band_side(negatives: int) -> int:
    """Rows of a tile: wide bands take large tiles, in narrow ones these would be empty for the most part."""
    return min(TILE, max(64, padded(negatives)))


def tile_places(n: int, negatives: int) -> Iterator[tuple[slice, slice, bool]]:
    """Rows, columns, and whether the tile also stands for its transpose"""
    if negatives == n - 1:
        for i, j in upper_tiles(n):
            yield i, j, i != j
        return
    side = _band_side(negatives)
    for start in range(0, n, side):
        i = slice(start, min(start + side, n))
        at = start
        while at < min(i.stop + negatives, start + n):
            first = at % n
            j = slice(first, min(first + side, n))
            yield i, j, False
            at += j.stop - j.start


class _Batch:
    """Unit rows, the tiles of their products, and what the native loops want to know."""

    def __init__(
        self,
        online: Tensor,
        target: Tensor,
        temperature: float | Tensor,
        alpha: float,
        beta: float,
        num_negatives: int | None,
        normalize: bool,
        operand: torch.dtype,
    ) -> None:
        self.n, self.d = online.shape
        self.inputs, self.normalize = (online, target), normalize
        tau = float(temperature)
        self.tau = tau if tau > 0 else torch.nan  # it makes everything NaN
        self.negatives = self.n - 1 if num_negatives is None else num_negatives
        fixed = normalize and tau >= LOWEST_FIXED_MAXIMUM_TEMPERATURE
        self.native = _C.RelicBatch(self.n, self.negatives, self.tau, fixed, alpha, beta)
        self.offset = padded(self.n)  # of the target in z
        self.z = torch.zeros(2 * self.offset, self.d, **FLOAT32)
        self.halves = self.z[: self.n], self.z[self.offset : self.offset + self.n]
        self.inv_norm = torch.empty(2, self.n, **FLOAT32)
        for x, z, inv_norm in zip(self.inputs, self.halves, self.inv_norm, strict=True):
            _C.embeddings_normalize(
                x.data_ptr(), DTYPE_CODES[x.dtype], self.n, self.d, normalize, DTYPE_CODES[operand],
                z.data_ptr(), inv_norm.data_ptr(),
            )  # fmt: skip
        self.tiles = tiles_for(self.z, operand, 2)

    def target(self, rows: slice) -> slice:
        return slice(self.offset + rows.start, self.offset + rows.stop)

    def walk(self) -> Iterator[tuple[slice, slice, Tensor, Tensor, tuple[int | bool, ...]]]:
        """Rows, columns, tiles of S and of S^T, and both as the native loops take them"""
        for i, j, mirrored in tile_places(self.n, self.negatives):
            a, b = self.tiles.logits(i, self.target(j)), self.tiles.logits(self.target(i), j, 1)
            yield i, j, a, b, (a.data_ptr(), b.data_ptr(), a.stride(0), *a.shape, i.start, j.start, mirrored)


def forward(
    online: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    alpha: float,
    beta: float,
    num_negatives: int | None,
    normalize: bool,
    operand: torch.dtype,
    count_exceeding: bool,
) -> tuple[Tensor, Tensor]:
    """losses [B], stats [8, B] (see csrc/cpu/relic.h)"""
    x = _Batch(online, target, temperature, alpha, beta, num_negatives, normalize, operand)
    sums = torch.zeros(_C.RELIC_SUMS, x.n, **FLOAT32)
    sums[-2:] = torch.finfo(torch.float32).min
    s_pos, losses = torch.empty(2, x.n, **FLOAT32)
    _C.embeddings_dots(*(half.data_ptr() for half in x.halves), x.n, x.d, s_pos.data_ptr())
    for *_, places in x.walk():
        _C.relic_forward_tile(*places, x.native, count_exceeding, s_pos.data_ptr(), sums.data_ptr())
    stats = torch.empty(_C.RELIC_STATS, x.n, **FLOAT32)
    _C.relic_finish_forward(x.native, s_pos.data_ptr(), sums.data_ptr(), losses.data_ptr(), stats.data_ptr())
    return losses, stats


def backward(
    grad: Tensor,
    online: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    alpha: float,
    beta: float,
    num_negatives: int | None,
    normalize: bool,
    operand: torch.dtype,
    target_grad: bool,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """donline, dtarget [B, D] in the inputs' dtype (dtarget [0] where not wanted) and dtemperature, from grad [B]"""
    x = _Batch(online, target, temperature, alpha, beta, num_negatives, normalize, operand)
    dz = x.tiles.zeros()
    for i, j, a, b, places in x.walk():
        _C.relic_backward_tile(*places, x.native, grad.data_ptr(), stats.data_ptr())
        x.tiles.add_symmetric(dz, i, x.target(j), a, "both" if target_grad else "left")
        x.tiles.add_symmetric(dz, x.target(i), j, b, "both" if target_grad else "right")
    pull, dots = grad * stats[5], torch.empty(2, x.n, **FLOAT32)
    gradients = [torch.empty_like(online), torch.empty_like(target) if target_grad else target.new_empty(0)]
    for k in range(1 + target_grad):
        _C.embeddings_gradient(
            x.inputs[k].data_ptr(), DTYPE_CODES[online.dtype], x.n, x.d, normalize, x.tau, x.inv_norm[k].data_ptr(),
            pull.data_ptr(), x.halves[1 - k].data_ptr(), dz[k * x.offset :].data_ptr(), dz.stride(0),
            gradients[k].data_ptr(), dots[k].data_ptr(),
        )  # fmt: skip
    return gradients[0], gradients[1], dots[0].sum() * (-1 / x.tau)
