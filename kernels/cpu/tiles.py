"""Tiles of A B^T and the products that go back from them: torch.mm, or AMX where bf16 results must stay float32."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sslops import _C

TILE = 512
# Not what the user may have set as defaults: the native core reads these through pointers.
FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# Below this temperature the maximum is tracked, which costs a second exponential per pair. Above it, with 1 for the
# maximum, no sum of exp((s - 1) / tau) is below exp(-43): half of float32's range, the other half being for grad / r.
# (|s| is at most 1.01, whatever rounding did to unit rows.)
LOWEST_FIXED_MAXIMUM_TEMPERATURE = 2.02 / 43


def softmax_scale(temperature: float | Tensor, normalize: bool) -> tuple[float, bool]:
    """tau (NaN if not positive: it makes everything NaN) and whether the maximum of s is taken to be 1"""
    tau = float(temperature)
    return (tau if tau > 0 else torch.nan), normalize and tau >= LOWEST_FIXED_MAXIMUM_TEMPERATURE


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the CPU kernels cannot take such tensors; None if they can."""
    if dtype not in DTYPE_CODES:
        return f"no {dtype} kernel: float32, float16 and bfloat16"
    return None


def upper_tiles(rows: int) -> Iterator[tuple[slice, slice]]:
    """Row and column ranges of the tiles on and above the diagonal of a [rows, rows] matrix.

    Symmetry saves nothing in the tiles on the diagonal: they are half as large, and a small matrix has no larger ones.
    """
    half = TILE // 2
    side = TILE if rows > 2 * TILE else half
    for i in range(0, rows, side):
        for a in range(i, min(i + side, rows), half):
            for b in range(a, min(i + side, rows), half):
                yield slice(a, min(a + half, rows)), slice(b, min(b + half, rows))
        for j in range(i + side, rows, side):
            yield slice(i, i + side), slice(j, min(j + side, rows))


def row_tiles(rows: slice, columns: int) -> Iterator[tuple[slice, slice]]:
    """Row and column ranges of the tiles of these rows of a [.., columns] matrix."""
    for i in range(rows.start, rows.stop, TILE):
        for j in range(0, columns, TILE):
            yield slice(i, min(i + TILE, rows.stop)), slice(j, min(j + TILE, columns))


class Float32Tiles:
    """Z Z^T in float32 tiles, and W Z accumulated from symmetric W.

    z: [M, D] float32. Half-precision operands come as the float32 numbers that they are, and are multiplied as torch's
    float32 matmul precision says: exactly, unless it was lowered.
    """

    def __init__(self, z: Tensor, side: int, held: int) -> None:
        self._z = z
        self._tiles = z.new_empty(held, side, side).unbind()
        self._blocks: dict[tuple[int, int], Tensor] = {}  # of rows, sliced once for many tiles

    def _rows(self, i: slice) -> Tensor:
        block = self._blocks.get((i.start, i.stop))
        if block is None:
            block = self._blocks[i.start, i.stop] = self._z[i]
        return block

    def logits(self, i: slice, j: slice, slot: int = 0) -> Tensor:
        """z[i] z[j]^T in one of the scratch tiles, which the next call for that slot overwrites."""
        left, right = self._rows(i), self._rows(j)
        return torch.mm(left, right.t(), out=self.scratch(len(left), len(right), slot))

    def scratch(self, rows: int, cols: int, slot: int = 0) -> Tensor:  # the next call for that slot overwrites it
        tile = self._tiles[slot]
        return tile if tile.shape == (rows, cols) else tile[:rows, :cols]

    def zeros(self, rows: int | None = None) -> Tensor:
        """[M, D], or its first rows, to accumulate into; the row stride is its own."""
        return torch.zeros_like(self._z[:rows])

    def add_symmetric(self, out: Tensor, i: slice, j: slice, w: Tensor, sides: str = "both") -> None:
        """out[i] += w z[j], the left side, and for a tile off the diagonal out[j] += w^T z[i], the right one."""
        if sides != "right":
            out[i].addmm_(w, self._rows(j))
        if sides != "left" and i != j:
            out[j].addmm_(w.t(), self._rows(i))


def padded(size: int) -> int:
    """Up to a whole number of the blocks that Bf16Tiles are made of."""
    return size + -size % _C.GEMM_BLOCK


class Bf16Tiles:
    """The same from bf16 operands on AMX tiles with float32 results; W is rounded to bf16 for its product."""

    def __init__(self, z: Tensor, side: int, held: int) -> None:
        m, d = (padded(size) for size in z.shape)
        # Tiles of rows may start anywhere, and are read and added to in blocks: one more.
        self._z = torch.zeros(m + _C.GEMM_BLOCK, d, dtype=torch.bfloat16, device="cpu")
        self._z[: z.shape[0], : z.shape[1]] = z
        self._as_right, self._transposed_as_right = self._z.new_empty(2, m, d)
        _C.gemm_pack(self._z.data_ptr(), m, d, self._as_right.data_ptr(), self._transposed_as_right.data_ptr())
        side = padded(side)
        self._tiles = torch.empty(held, side, side, **FLOAT32).unbind()
        self._w, self._w_transposed = self._z.new_empty(
            2, side, side + _C.GEMM_BLOCK
        )  # rows that miss each other's cache sets

    def logits(self, i: slice, j: slice, slot: int = 0) -> Tensor:
        tile = self._tiles[slot]
        rows, cols, d = i.stop - i.start, j.stop - j.start, self._z.shape[1]
        left, right = self._z[i.start].data_ptr(), self._transposed_as_right[j.start].data_ptr()
        _C.gemm_matmul(left, d, right, 16 * d, 512, padded(rows), padded(cols), d, tile.data_ptr(), len(tile), False)
        return tile[:rows, :cols]

    def scratch(self, rows: int, cols: int, slot: int = 0) -> Tensor:  # the next call for that slot overwrites it
        return self._tiles[slot][:rows, :cols]

    def zeros(self, rows: int | None = None) -> Tensor:
        return torch.zeros(self._z[:rows].shape, **FLOAT32)

    def add_symmetric(self, out: Tensor, i: slice, j: slice, w: Tensor, sides: str = "both") -> None:
        rows, cols = w.shape
        to = (x for out in (self._w, self._w_transposed) for x in (out.data_ptr(), out.stride(0)))
        _C.gemm_round_both(w.data_ptr(), w.stride(0), rows, cols, *to)
        if sides != "right":
            self._add(out, i, self._w, j)
        if sides != "left" and i != j:
            self._add(out, j, self._w_transposed, i)

    def _add(self, out: Tensor, rows: slice, w: Tensor, inner: slice) -> None:
        """out[rows] += w z[inner]"""
        d = self._z.shape[1]
        m, k = padded(rows.stop - rows.start), padded(inner.stop - inner.start)
        right = self._as_right[inner.start].data_ptr()
        _C.gemm_matmul(w.data_ptr(), w.stride(0), right, 512, 32 * d, m, d, k, out[rows.start].data_ptr(), d, True)


def tiles_for(z: Tensor, operand: torch.dtype, side: int = TILE, held: int = 1) -> Float32Tiles | Bf16Tiles:
    """z [M, D] float32, holding values that `operand` can represent; `held` tiles of up to `side` rows at once."""
    kind = Bf16Tiles if operand == torch.bfloat16 and _C.has_bf16_gemm() else Float32Tiles
    return kind(z, min(side, len(z)), held)


def ranges(size: int, step: int) -> Iterator[slice]:
    for first in range(0, size, step):
        yield slice(first, min(first + step, size))


class Float32Stream:
    """Q C^T for Q [B, D], float32, and a C of any length and dtype that passes by, some rows at a time."""

    ROWS, COLUMNS = 256, 1024  # of a tile of Q C^T at most: 1 MB, half of a core's cache

    def __init__(self, q: Tensor) -> None:
        self._q = q
        self._tile = torch.empty(min(self.ROWS, len(q)), self.COLUMNS, **FLOAT32)
        self._c = self._copy = q[:0]

    def load(self, c: Tensor) -> None:
        """The rows of C, COLUMNS at most, that the calls below mean."""
        if c.dtype == torch.float32:
            self._c = c
        else:
            if not len(self._copy):
                self._copy = torch.empty(self.COLUMNS, c.shape[1], **FLOAT32)
            self._c = self._copy[: len(c)].copy_(c)

    def logits(self, i: slice) -> Tensor:
        """q[i] c^T in the scratch tile, which the next call overwrites."""
        return torch.mm(self._q[i], self._c.t(), out=self._tile[: i.stop - i.start, : len(self._c)])

    def weights(self) -> Tensor:
        """Where the next `add` expects them: float32 where the logits were, or bf16 padded with zeros."""
        return self._tile

    def zeros(self, rows: int) -> Tensor:
        """[rows, D] to accumulate into; the shape is padded and the row stride its own."""
        return torch.zeros(rows, self._q.shape[1], **FLOAT32)

    def add(self, out: Tensor, i: slice) -> None:
        """out[i] += weights c"""
        out[i].addmm_(self._tile[: i.stop - i.start, : len(self._c)], self._c)

    def add_transposed(self, out: Tensor, i: slice, w: Tensor) -> None:
        """out += w^T q[i], w float32 where the logits were"""
        out[: len(self._c)].addmm_(w.t(), self._q[i])


class Bf16Stream:
    """The same on AMX tiles: bf16 operands, the weights too, and float32 results."""

    ROWS, COLUMNS = 256, 1024

    def __init__(self, q: Tensor) -> None:
        m, d = (padded(size) for size in q.shape)
        self._q = torch.zeros(m, d, dtype=torch.bfloat16, device="cpu")
        self._q[: q.shape[0], : q.shape[1]] = q
        self._q_as_right, _ = packed = self._q.new_empty(2, m, d)
        _C.gemm_pack(self._q.data_ptr(), m, d, *(x.data_ptr() for x in packed))
        side = min(self.ROWS, m)
        self._tile = torch.empty(side, self.COLUMNS, **FLOAT32)
        # Rows that miss each other's cache sets.
        self._w = self._q.new_empty(side, self.COLUMNS + _C.GEMM_BLOCK)
        self._w_transposed = self._q.new_empty(self.COLUMNS, side + _C.GEMM_BLOCK)
        self._copy = self._q.new_zeros(self.COLUMNS, d)
        self._as_right, self._transposed_as_right = self._q.new_empty(2, self.COLUMNS, d)
        self._columns = 0

    def load(self, c: Tensor) -> None:
        self._columns = len(c)
        rows, d = padded(len(c)), self._q.shape[1]
        if c.dtype != torch.bfloat16 or c.shape != (rows, d):
            self._copy[: len(c), : c.shape[1]] = c
            self._copy[len(c) : rows] = 0
            c = self._copy
        _C.gemm_pack(c.data_ptr(), rows, d, self._as_right.data_ptr(), self._transposed_as_right.data_ptr())

    def _matmul(self, a: Tensor, b: Tensor, steps: tuple[int, int], sizes: tuple[int, int, int], out: Tensor) -> None:
        accumulate = out is not self._tile
        _C.gemm_matmul(
            a.data_ptr(), a.stride(0), b.data_ptr(), *steps, *sizes, out.data_ptr(), out.stride(0), accumulate
        )

    def logits(self, i: slice) -> Tensor:
        rows, d = i.stop - i.start, self._q.shape[1]
        sizes = padded(rows), padded(self._columns), d
        self._matmul(self._q[i.start :], self._transposed_as_right, (16 * d, 512), sizes, self._tile)
        return self._tile[:rows, : self._columns]

    def weights(self) -> Tensor:
        return self._w

    def zeros(self, rows: int) -> Tensor:
        return torch.zeros(padded(rows), self._q.shape[1], **FLOAT32)

    def add(self, out: Tensor, i: slice) -> None:
        d = self._q.shape[1]
        sizes = padded(i.stop - i.start), d, padded(self._columns)
        self._matmul(self._w, self._as_right, (512, 32 * d), sizes, out[i.start :])

    def add_transposed(self, out: Tensor, i: slice, w: Tensor) -> None:
        (rows, cols), d = w.shape, self._q.shape[1]
        to = self._w_transposed
        _C.gemm_round_both(w.data_ptr(), w.stride(0), rows, cols, 0, 0, to.data_ptr(), to.stride(0))
        sizes = padded(cols), d, padded(rows)
        self._matmul(self._w_transposed, self._q_as_right[i.start :], (512, 32 * d), sizes, out)


Stream = Float32Stream | Bf16Stream


def stream_for(q: Tensor, operand: torch.dtype) -> Stream:
    """q [B, D] float32, holding values that `operand` can represent."""
    return Bf16Stream(q) if operand == torch.bfloat16 and _C.has_bf16_gemm() else Float32Stream(q)
