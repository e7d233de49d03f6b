// The rows of two matrices as both operands of S = left right^T, and its tiles, each for its rows and its columns: what
// the losses of images and their texts are epilogues of.
#pragma once
#include "rows.h"
#include "softmax_tiles.h"
#include "tiles.h"
#include "tournament.h"

namespace sslops {
namespace {

// Row i of left [B, D] and row first + i of right [N, D] are a pair. S [B, N] is written to `kept`, if there is one, or
// read from there if it is known.
struct Pairs {
  int64_t b, n, d, first, side, padded;  // padded: b to whole groups
  DType operand_dtype;
  Buffer<float> inv_norm;
  Rows left_rows, right_rows;
  Operand left, right;
  float* kept;
  bool known = false;

  Pairs(const Tensor& l, const Tensor& r, bool normalize, DType operand, int64_t first, float* kept = nullptr)
      : b(l.sizes[0]),
        n(r.sizes[0]),
        d(l.sizes[1]),
        first(first),
        side(n <= 64     ? 32  // for two threads
             : n <= 512  ? 64
             : n <= 2048 ? 128
                         : kMaxSide),
        padded(round_up(b, kGroup)),
        operand_dtype(operand),
        inv_norm(b + n),
        left_rows(l, normalize, inv_norm),
        right_rows(r, normalize, inv_norm + b),
        left(b, d, operand, false),
        right(n, d, operand),
        kept(kept) {
    const auto fill = [&](Operand& to, const Rows& rows, int64_t count, float* inverse, int64_t from) {
      for (int64_t i = from; i < from + count; ++i) inverse[i] = rows.norm_of(i);
      to.fill(from, count,
              [&](int64_t i, int64_t j, int lanes) { return round_to(operand_dtype, rows.at(i, j, lanes)); });
    };
    parallel_tickets(ceil_div(n, kGroup), [&](int64_t ticket) {
      const int64_t from = ticket * kGroup;
      fill(right, right_rows, at_most(n - from, kGroup), inv_norm + b, from);
      if (from < b) fill(left, left_rows, at_most(b - from, kGroup), inv_norm, from);
    });
  }

  // Where sums over rows and over columns lie side by side: a row's is at i, a column's at padded + j.
  int64_t sums() const { return padded + round_up(n, kGroup); }
};

// visit(tile, part, j0) over the tiles of S, columns j0 .. being padded + j0 .. of the part: those of a row, and those
// of a column, in a fixed order and one at a time. -inf beyond the columns.
template <typename Visit>
void for_each_tile(const Pairs& x, const Visit& visit) {
  const Grid panels(ceil_div(x.b, x.side), ceil_div(x.n, x.side));
  panels.run([&] { return Tile(x.side, x.right.bf16); },
             [&](int64_t i, int64_t j, Tile& tile) {
               const int64_t i0 = i * x.side, rows = at_most(x.b - i0, x.side);
               const int64_t j0 = j * x.side, columns = at_most(x.n - j0, x.side);
               if (!x.known) tile.multiply(x.left, i0, rows, x.right, j0, columns);
               for (int64_t k = 0; k < rows && x.kept; ++k) {
                 float *const kept = x.kept + (i0 + k) * x.n + j0, *const s = tile.s + k * tile.ld;
                 std::memcpy(x.known ? s : kept, x.known ? kept : s, columns * sizeof(float));
               }
               const Part part{tile.s, tile.ld, i0, rows, x.padded + j0, columns, true};
               for (int64_t k = 0; k < rows; ++k)
                 for (int64_t column = columns; column < part.width(); ++column) part.row(k)[column] = -kInf;
               visit(tile, part, j0);
             });
}

// run(i, s) for the pairs in a tile, of row i of left.
template <typename Run>
void for_each_pair(const Pairs& x, const Part& t, int64_t j0, const Run& run) {
  for (int64_t k = 0; k < t.rows; ++k)
    if (const int64_t j = x.first + t.i0 + k - j0; j >= 0 && j < t.columns) run(t.i0 + k, t.row(k)[j]);
}

// dleft [B, D] and dright [N, D], or one of them, or none, from dL/dS = factor W, where weigh(part, j0) makes of a tile
// of S that of W. Returns <left, dL/dleft> or, without dleft, <right, dL/dright>: the sum of s dL/ds.
template <typename Weigh>
double differentiate(const Pairs& x, float factor, const Weigh& weigh, const Tensor& dleft, const Tensor& dright) {
  const int64_t ld = x.right.ld, slack = bf16_gemm::kBlock;
  const int64_t rows = dleft.numel ? x.b : 0, columns = dright.numel ? x.n : 0;
  Buffer<float> left((rows + slack) * ld), right((columns + slack) * ld);
  parallel_for(rows + columns, kGroup, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      std::memset(k < rows ? left + k * ld : right + (k - rows) * ld, 0, ld * sizeof(float));
  });
  for_each_tile(x, [&](Tile& tile, const Part& t, int64_t j0) {
    weigh(t, j0);
    if (rows + columns == 0) return;
    tile.add(t.rows, t.columns, x.right, j0, rows ? left + t.i0 * ld : nullptr, x.left, t.i0,
             columns ? right + j0 * ld : nullptr);
  });
  const auto finish = [&](const Rows& of, float* v, int64_t i, const Tensor& out) {
    for_each_vector(x.d,
                    [&](int64_t j, int lanes) { store_lanes(v + j, lanes, load_lanes(v + j, lanes, 0.f) * factor); });
    return of.backward(i, v, out, i);
  };
  const double of_left = sum_rows(rows, [&](int64_t i) { return finish(x.left_rows, left + i * ld, i, dleft); });
  const double of_right = sum_rows(columns, [&](int64_t i) { return finish(x.right_rows, right + i * ld, i, dright); });
  return rows ? of_left : of_right;
}

}  // namespace
}  // namespace sslops
