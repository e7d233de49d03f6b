"""SIGReg in Triton: a sweep over tiles of projections in either direction. Forward keeps their sums over the batch,
backward the gradients of a chunk's, whose product with the directions is the library's.

A projection u takes one sine and cosine, of step u; the knots t_k = k step follow by rotations, and the gradient by
Horner's rule. sine and 1 - cosine: with them small turns lose no digits, however many follow (csrc/cpu/turn.h). The
projections are float32's own, on no matrix unit: rounded phases would be other phases. With a process group the sums
are summed over the ranks, and each has its own rows' gradient.

Order of every sum is fixed, if the matmul's is. Scratch: the sums in float64 for at most PARTS blocks of rows; dz in
float32, and max(PANEL, ROWS M) projections' gradients, which an H100's second cache holds.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import refuses  # noqa: F401
from .rows import ragged_tile

if TYPE_CHECKING:
    from sslops.distributed import Part
    from sslops.ops.sigreg import Arguments

DISTRIBUTED = True

SIZES = ("N", "M", "knots", "blocks", "tiles", "views", "rows")

STREAM = 4  # RandomStream.SIGREG
PROGRAMS = 528  # four on each of an H100's 132 multiprocessors
PARTS = 8
TILE: dict[str, Any] = {"BLOCK_N": 64, "BLOCK_M": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1, **launch.FUSED}
ROWS, PANEL = 256, 2**22

FAR = tl.constexpr(12800.0)  # from there on a number of quarter turns times a part of pi / 2 is not exact


@triton.jit
def _uniform(word):
    """In (0, 1), from 23 bits"""
    return ((word >> 9).to(tl.float64) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _box_muller(a, c):
    """Two normal numbers, of a radius by word a and an angle by c: by Taylor's series of half the opposite angle"""
    r = tl.sqrt(-2.0 * tl.log(_uniform(a)))
    half = (_uniform(c) - 0.5) * 3.141592653589793
    square = half * half
    sine = square * -7.647163731819816e-13 + 1.6059043836821613e-10  # 1 / n!
    sine = sine * square - 2.505210838544172e-08
    sine = sine * square + 2.7557319223985893e-06
    sine = sine * square - 1.984126984126984e-04
    sine = sine * square + 8.333333333333333e-03
    sine = sine * square - 0.16666666666666666
    sine = sine * square * half + half
    cosine = square * 4.779477332387385e-14 - 1.1470745597729725e-11
    cosine = cosine * square + 2.08767569878681e-09
    cosine = cosine * square - 2.755731922398589e-07
    cosine = cosine * square + 2.48015873015873e-05
    cosine = cosine * square - 1.388888888888889e-03
    cosine = cosine * square + 0.041666666666666664
    cosine = cosine * square - 0.5
    cosine = cosine * square + 1.0
    return (sine * sine * 2.0 - 1.0) * r, sine * cosine * -2.0 * r


@triton.jit
def _normals(key, row, quad, quads, STREAM: tl.constexpr):
    """Four numbers [.., ..] in float64, of Philox's block row quads + quad: see sslops/_random.py"""
    block = row.to(tl.int64) * quads + quad
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(key, low, high, tl.zeros_like(low) + STREAM, tl.zeros_like(low))
    first, third = _box_muller(a, c)
    second, fourth = _box_muller(b, d)
    return first, second, third, fourth


@triton.jit(do_not_specialize=("M",))
def _draw(key, directions, M, D, quads, STREAM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr):
    """directions [M, D]: unit vectors, drawn twice rather than kept for their norms"""
    key = tl.load(key)
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    squares = tl.zeros([BLOCK_R, BLOCK_Q], tl.float64)
    for first in range(0, quads, BLOCK_Q):
        quad = first + tl.arange(0, BLOCK_Q)[None, :]
        a, b, c, d = _normals(key, row, quad, quads, STREAM)
        squares += tl.where(4 * quad < D, a * a, 0.0) + tl.where(4 * quad + 1 < D, b * b, 0.0)
        squares += tl.where(4 * quad + 2 < D, c * c, 0.0) + tl.where(4 * quad + 3 < D, d * d, 0.0)
    norm = tl.sqrt(tl.sum(squares, 1))[:, None]
    for first in range(0, quads, BLOCK_Q):
        quad = first + tl.arange(0, BLOCK_Q)[None, :]
        a, b, c, d = _normals(key, row, quad, quads, STREAM)
        to = directions + row.to(tl.int64) * D + 4 * quad
        tl.store(to, (a / norm).to(tl.float32), mask=(row < M) & (4 * quad < D))
        tl.store(to + 1, (b / norm).to(tl.float32), mask=(row < M) & (4 * quad + 1 < D))
        tl.store(to + 2, (c / norm).to(tl.float32), mask=(row < M) & (4 * quad + 2 < D))
        tl.store(to + 3, (d / norm).to(tl.float32), mask=(row < M) & (4 * quad + 3 < D))


@triton.jit(do_not_specialize=("knots",))
def _knots(table, step, knots, BLOCK: tl.constexpr):
    """table [3, knots]: exp(-t^2 / 2), that as the trapezoidal rule weighs it, and that times t"""
    k = tl.arange(0, BLOCK)
    t = (k + 1).to(tl.float64) * tl.load(step)
    normal = tl.exp(t * t * -0.5)
    weight = tl.where(k + 1 < knots, 2.0, 1.0) * tl.load(step) * normal
    tl.store(table + k, normal.to(tl.float32), mask=k < knots)
    tl.store(table + knots + k, weight.to(tl.float32), mask=k < knots)
    tl.store(table + 2 * knots + k, (weight * t).to(tl.float32), mask=k < knots)


@triton.jit
def _small_turn(theta, rest, quarters):
    """sine and versine, 1 - cosine, of theta + rest + quarters pi / 2: |theta| <= pi / 4, rest a rounding of it"""
    square = theta * theta
    p = -1.9514957608e-4 * square + 8.3321584084e-3
    p = p * square - 1.6666654573e-1
    q = -2.4475874016e-5 * square + 1.3887720755e-3
    q = q * square - 4.1666654720e-2
    q = q * square + 0.5
    versine = q * square
    sine = (p * (theta * square) + (rest - rest * versine)) + theta
    versine = rest * sine + versine
    cosine = 1.0 - versine
    odd = (quarters & 1) == 1
    turned_sine = tl.where(odd, cosine, sine)
    turned_cosine = tl.where(odd, sine, cosine)
    turned_sine = tl.where((quarters & 2) == 0, turned_sine, -turned_sine)
    turned_cosine = tl.where(((quarters + 1) & 2) == 0, turned_cosine, -turned_cosine)
    return turned_sine, tl.where((quarters & 3) == 0, versine, 1.0 - turned_cosine)


@triton.jit
def _turn(theta):
    """sine and versine of theta up to 1e9, to two units in the last place, or of 1 if |theta| > pi / 4; beyond, of some
    angle
    """
    if tl.max(tl.max(tl.abs(theta), 1), 0) < FAR:
        number = tl.floor(theta * 0.636619772 + 0.5)
        # pi / 2 in parts, of which products with up to 2^13 are exact
        most = theta - number * 1.5703125
        near = most - number * 4.837512969970703125e-4
        rest = ((most - near) - number * 4.837512969970703125e-4) - number * 7.54978995489188216e-8
        quarters = number.to(tl.int32)
    else:
        wide = theta.to(tl.float64)
        quarters = tl.zeros_like(theta).to(tl.int32)
        for _ in range(0, 3):  # what is left of 1e38 is below pi / 4 then
            turns = tl.floor(wide * 0.6366197723675814 + 0.5)
            wide = (wide - turns * 1.5707963267948966) - turns * 6.123233995736766e-17
            quarters += (turns - 4.0 * tl.floor(turns * 0.25)).to(tl.int32)
        near = wide.to(tl.float32)
        rest = (wide - near.to(tl.float64)).to(tl.float32)
    return _small_turn(near, rest, quarters)


@triton.jit
def _projections(z, directions, i, j, N, M, D, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """u [BLOCK_N, BLOCK_M] of the rows from i and the directions from j; z is the view"""
    u = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(0, D, BLOCK_K):
        a = ragged_tile(z, i, k, N, D, BLOCK_N, BLOCK_K).to(tl.float32)
        b = ragged_tile(directions, j, k, M, D, BLOCK_M, BLOCK_K)
        u = tl.dot(a, tl.trans(b), u, input_precision="ieee")
    return u


@triton.jit(do_not_specialize=SIZES)
def _sums(
    z, directions, table, step, parts, N, M, D, knots, tiles, views,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """parts [blocks, V, 2, knots, M] of float64: sums over a block's tiles of rows of cos(t u) - phi and of sin(t u)"""
    j, block, view = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2).to(tl.int64)
    z += view * N * D
    step = tl.load(step).to(tl.float32)
    m = j + tl.arange(0, BLOCK_M)
    row = tl.arange(0, BLOCK_N)[:, None]
    size = tl.cast(knots, tl.int64) * M
    parts += (block.to(tl.int64) * views + view) * 2 * size + m
    begin = block * tiles * BLOCK_N
    for i in range(begin, tl.minimum(begin + tiles * BLOCK_N, N), BLOCK_N):
        u = _projections(z, directions, i, j, N, M, D, BLOCK_N, BLOCK_M, BLOCK_K)
        sine, versine = _turn(u * step)
        s, c = sine, 1.0 - versine
        there = m < tl.where(i > begin, M, 0)  # what an earlier tile has written
        for k in range(0, knots):
            phi = tl.load(table + k)
            at = parts + tl.cast(k, tl.int64) * M
            cosines = tl.load(at, mask=there, other=0.0) + tl.sum(tl.where(i + row < N, c - phi, 0.0), 0).to(tl.float64)
            sines = tl.load(at + size, mask=there, other=0.0) + tl.sum(tl.where(i + row < N, s, 0.0), 0).to(tl.float64)
            tl.store(at, cosines, mask=m < M)
            tl.store(at + size, sines, mask=m < M)
            turned = (c - sine * s) - versine * c
            s = (s + sine * c) - versine * s
            c = turned
        tl.debug_barrier()  # the parts are read again by other threads


@triton.jit(do_not_specialize=SIZES)
def _statistic(sums, table, found, M, knots, BLOCK: tl.constexpr):
    """found [V 2 knots] of float64: the weighted squares of a row of sums"""
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, M, BLOCK):
        m = first + tl.arange(0, BLOCK)
        x = tl.load(sums + row.to(tl.int64) * M + m, mask=m < M, other=0.0)
        total += x * x
    weight = tl.load(table + knots + row % knots)
    tl.store(found + row, (tl.sum(total, 0) * weight).to(tl.float64))


@triton.jit(do_not_specialize=SIZES)
def _gradients(
    z, directions, table, step, sums, du, N, M, D, knots, rows,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """du [views, rows, M] of the rows from z on, in views of N: the projections' gradients, less a factor"""
    i, j, view = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_M, tl.program_id(2).to(tl.int64)
    step = tl.load(step).to(tl.float32)
    size = tl.cast(knots, tl.int64) * M
    m = j + tl.arange(0, BLOCK_M)
    sums += view * 2 * size + m
    u = _projections(z + view * N * D, directions, i, j, rows, M, D, BLOCK_N, BLOCK_M, BLOCK_K)
    sine, versine = _turn(u * step)
    p = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    q = p
    for back in range(0, knots):
        k = knots - 1 - back
        factor = tl.load(table + 2 * knots + k)
        at = sums + tl.cast(k, tl.int64) * M
        a = (tl.load(at + size, mask=m < M, other=0.0) * factor)[None, :]
        b = (tl.load(at, mask=m < M, other=0.0) * factor)[None, :]
        real = (a - q * sine) + (p - p * versine)
        q = (b + p * sine) + (q - q * versine)
        p = real
    row = i + tl.arange(0, BLOCK_N)[:, None]
    to = du + (view * rows + row) * M + m[None, :]
    tl.store(to, (p - p * versine) - q * sine, mask=(row < rows) & (m < M)[None, :])


def _table(x: Arguments) -> tuple[Tensor, Tensor]:
    """The knots' [3, K - 1], and their step as float64 []"""
    knots = x.knots - 1
    step = torch.full((), x.t_max / knots, dtype=torch.float64, device=x.z.device)
    table = step.new_empty(3, knots, dtype=torch.float32)
    _knots[1,](table, step, knots, triton.next_power_of_2(knots), num_warps=1, **launch.FUSED)
    return table, step


def draw(key: Tensor, slices: int, d: int) -> Tensor:
    """[M, D] float32: unit vectors, those of float64 rounded"""
    directions, quads = key.new_empty(slices, d, dtype=torch.float32), triton.cdiv(d, 4)
    if d:
        block = min(triton.next_power_of_2(quads), 32)
        _draw[triton.cdiv(slices, 8),](key, directions, slices, d, quads, STREAM, 8, block, num_warps=4, **launch.FUSED)
    return directions


def forward(x: Arguments, scale: float, part: Part | None = None) -> tuple[Tensor, ...]:
    """loss [], the statistic times scale; sums [V, 2, K - 1, M] of all ranks; directions [M, D] if they are drawn"""
    views, n, d = x.z.shape
    with launch.on(x.z.device):
        directions, drawn = x.directions, x.z.new_empty(0, dtype=torch.float32)
        if directions is None:
            assert x.key is not None
            directions = drawn = draw(x.key, x.slices, d)
        m, knots = len(directions), x.knots - 1
        table, step = _table(x)
        across, rows = triton.cdiv(m, TILE["BLOCK_M"]), triton.cdiv(n, TILE["BLOCK_N"])
        tiles = triton.cdiv(rows, min(max(1, PROGRAMS // (across * max(1, views))), PARTS)) or 1
        blocks = triton.cdiv(rows, tiles)
        parts = x.z.new_empty(blocks, views, 2, knots, m, dtype=torch.float64)
        if parts.numel():
            _sums[across, blocks, views](x.z, directions, table, step, parts, n, m, d, knots, tiles, views, **TILE)
        sums = parts.sum(0).float()
        if part is not None:
            dist.all_reduce(sums, group=part.group)
        found = sums.new_empty(views * 2 * knots, dtype=torch.float64)
        if views:
            _statistic[len(found),](sums, table, found, m, knots, 1024, num_warps=4, **launch.FUSED)
        loss = (found.sum() * scale).float()
    return loss, sums, drawn


def backward(grad: Tensor, x: Arguments, scale: float, sums: Tensor, drawn: Tensor) -> Tensor:
    views, n, d = x.z.shape
    if not x.z.numel():
        return torch.empty_like(x.z)
    directions = drawn if x.directions is None else x.directions
    m, knots, new = len(directions), x.knots - 1, partial(x.z.new_empty, dtype=torch.float32)
    most = max(ROWS, PANEL // m)
    together = max(1, most // n)  # views
    with launch.on(x.z.device):
        (table, step), dz = _table(x), new(views, n, d)
        for view in range(0, views, together):
            for first in range(0, n, most):
                z, to = (each[view : view + together, first : first + most] for each in (x.z, dz))
                du = new(*z.shape[:2], m)
                _gradients[triton.cdiv(du.shape[1], TILE["BLOCK_N"]), triton.cdiv(m, TILE["BLOCK_M"]), len(du)](
                    z, directions, table, step, sums[view:], du, n, m, d, knots, du.shape[1], **TILE
                )
                launch.multiply(to.view(-1, d), du.flatten(0, 1), directions)
        return (dz * (grad * (2 * scale))).to(x.z.dtype)
