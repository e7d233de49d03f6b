"""RELIC on the CPU: nothing of size B x B. Rows of online and target lie in one matrix z, S = online target^T.

A tile of S and the tile of S^T at the same place hold what a row needs, its a and its b; and, with their roles changed,
what the rows need that the columns stand for. All others as negatives: the tiles on and above the diagonal. Few
negatives: only the tiles of their band. Each sweep over S is 2 B^2 D FLOP, its product with the target too.

The gradient needs all rows' statistics. A small batch's tiles are held until they are there, and forward leaves the
gradient under equal weights, as all reductions have them, for backward to scale. Else backward makes the tiles anew.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sslops import _C

from .tiles import DTYPE_CODES, FLOAT32, TILE, padded, refuses, softmax_scale, tiles_for, upper_tiles  # noqa: F401

# Of the tiles that forward may hold: all pairs of 1024 rows take 5 MiB.
HELD_BYTES = 16 << 20


def tile_places(n: int, negatives: int) -> list[tuple[slice, slice, bool]]:
    """Rows, columns, and whether the tile also stands for its transpose"""
    if negatives == n - 1:
        return [(i, j, i != j) for i, j in upper_tiles(n)]
    side = min(TILE, max(64, padded(negatives)))  # large tiles would be empty for the most part in a narrow band
    places = []
    for start in range(0, n, side):
        i = slice(start, min(start + side, n))
        at = start
        while at < min(i.stop + negatives, start + n):
            j = slice(at % n, min(at % n + side, n))
            places.append((i, j, False))
            at += j.stop - j.start
    return places


class _Plan(NamedTuple):
    places: list[tuple[slice, slice, bool]]
    side: int  # rows and columns of the largest tile
    held: bool  # whether forward holds all tiles where gradients are wanted


def _plan(n: int, num_negatives: int | None) -> _Plan:
    places = tile_places(n, n - 1 if num_negatives is None else num_negatives)
    places.sort(key=lambda place: place[0] != place[1])  # those with positives first: the others refer to them
    side = max((i.stop - i.start for i, _, _ in places), default=0)
    return _Plan(places, side, 8 * side**2 * len(places) <= HELD_BYTES)


class _Tile(NamedTuple):
    i: slice  # rows
    j: slice  # columns
    a: Tensor  # S there
    b: Tensor  # S^T there
    native: tuple[int | bool, ...]  # as the native loops take it


class _Batch:
    """Unit rows, the places of the tiles of their products, and what the native loops want to know."""

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
        self.inputs, self.normalize, self.operand = (online, target), normalize, operand
        self.tau, fixed = softmax_scale(temperature, normalize)
        self.places, self.side, self.held = _plan(self.n, num_negatives)
        self.native = _C.RelicBatch(
            self.n, self.n - 1 if num_negatives is None else num_negatives, self.tau, fixed, alpha, beta
        )
        self.offset = padded(self.n)  # of the target in z
        self.z = torch.empty(2 * self.offset, self.d, **FLOAT32)
        self.z[self.n : self.offset] = self.z[self.offset + self.n :] = 0
        self.halves = self.z[: self.n], self.z[self.offset : self.offset + self.n]
        self.inv_norm = torch.empty(2, self.n, **FLOAT32)
        for x, z, inv_norm in zip(self.inputs, self.halves, self.inv_norm, strict=True):
            _C.embeddings_normalize(
                x.data_ptr(), DTYPE_CODES[x.dtype], self.n, self.d, normalize, DTYPE_CODES[operand],
                z.data_ptr(), inv_norm.data_ptr(),
            )  # fmt: skip

    def target(self, rows: slice) -> slice:
        return slice(self.offset + rows.start, self.offset + rows.stop)

    def tiles(self, hold: bool) -> Iterator[_Tile]:
        """hold: each in memory of its own"""
        self._tiles = tiles_for(self.z, self.operand, self.side, 2 * len(self.places) if hold else 2)
        return self._computed(hold)

    def _computed(self, hold: bool) -> Iterator[_Tile]:
        for k, (i, j, mirrored) in enumerate(self.places):
            slot = 2 * k if hold else 0
            a = self._tiles.logits(i, self.target(j), slot)
            if i == j:
                b = self._tiles.scratch(len(a), len(a), slot + 1).copy_(a.t())
            else:
                b = self._tiles.logits(self.target(i), j, slot + 1)
            yield _Tile(i, j, a, b, (a.data_ptr(), b.data_ptr(), a.stride(0), *a.shape, i.start, j.start, mirrored))

    def gradients(self, tiles: Iterable[_Tile], grad: Tensor, stats: Tensor, found: Sequence[Tensor]) -> Tensor:
        """Into found: of the inputs [B, D], as many as there are. Returns the temperature's []. Uses the tiles up."""
        count = len(found)
        dz = self._tiles.zeros(count * self.offset)
        for i, j, a, b, native in tiles:
            _C.relic_backward_tile(*native, self.native, grad.data_ptr(), stats.data_ptr())
            if i == j:
                a += b.t()
            else:
                self._tiles.add_symmetric(dz, self.target(i), j, b, "both" if count == 2 else "right")
            self._tiles.add_symmetric(dz, i, self.target(j), a, "both" if count == 2 else "left")
        pull, dots = grad * stats[5], torch.empty(count, self.n, **FLOAT32)
        for k, x in enumerate(self.inputs[:count]):
            _C.embeddings_gradient(
                x.data_ptr(), DTYPE_CODES[x.dtype], self.n, self.d, self.normalize, self.tau,
                self.inv_norm[k].data_ptr(), pull.data_ptr(), self.halves[1 - k].data_ptr(),
                dz[k * self.offset :].data_ptr(), dz.stride(0), DTYPE_CODES[found[k].dtype], found[k].data_ptr(),
                dots[k].data_ptr(),
            )  # fmt: skip
        return dots[0].sum() * (-1 / self.tau)


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
    gradients: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """losses [B], stats [8, B] (see csrc/cpu/relic.h), gradients [gradients, B, D] and [] of their sum where held"""
    x = _Batch(online, target, temperature, alpha, beta, num_negatives, normalize, operand)
    sums = torch.zeros(_C.RELIC_SUMS, x.n, **FLOAT32)
    sums[-2:] = torch.finfo(torch.float32).min
    s_pos, losses = torch.empty(x.n, **FLOAT32), torch.empty(x.n, **FLOAT32)
    hold = gradients > 0 and x.held
    tiles = list(x.tiles(hold)) if hold else x.tiles(hold)
    for tile in tiles:
        if tile.i == tile.j:
            s_pos[tile.i] = tile.a.diagonal()
        _C.relic_forward_tile(*tile.native, x.native, count_exceeding, s_pos.data_ptr(), sums.data_ptr())
    stats = torch.empty(_C.RELIC_STATS, x.n, **FLOAT32)
    _C.relic_finish_forward(x.native, s_pos.data_ptr(), sums.data_ptr(), losses.data_ptr(), stats.data_ptr())
    of_sum, temperature_of_sum = torch.zeros(gradients, x.n, x.d, **FLOAT32), torch.zeros((), **FLOAT32)
    if hold:
        temperature_of_sum = x.gradients(tiles, torch.ones(x.n, **FLOAT32), stats, of_sum.unbind())
    return losses, stats, of_sum, temperature_of_sum


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
    gradients: int,
    stats: Tensor,
    of_sum: Tensor,
    temperature_of_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """donline, dtarget [B, D] in the inputs' dtype (dtarget [0] where not wanted) and dtemperature, from grad [B]"""
    if len(grad) and _plan(len(online), num_negatives).held and bool((grad == grad[:1]).all()):
        found = [(gradient * grad[0]).to(online.dtype) for gradient in of_sum]
        dtemperature = temperature_of_sum * grad[0]
    else:
        x = _Batch(online, target, temperature, alpha, beta, num_negatives, normalize, operand)
        found = [torch.empty_like(online) for _ in range(gradients)]
        dtemperature = x.gradients(x.tiles(hold=False), grad, stats, found)
    return found[0], found[1] if gradients == 2 else target.new_empty(0), dtemperature
