// A A^T of views [N, D], N rows of which are few: the Gram matrices that know what D x D correlations add up to.
#pragma once
#include "strips.h"
#include "transpose.h"

namespace sslops {
namespace {

// The operand of A A^T: rows of a view, kPanel of them side by side, on both sides of gemm(). Zeros after the last.
class Transposed {
 public:
  explicit Transposed(const View& v)
      : n(v.n), d(v.d), data_(round_up(v.n, kPanel) * v.d), squares_(ceil_div(v.d, kStrip) * v.n) {}

  void pack(const Strip& strip, int64_t first, int64_t width) {
    for (int64_t i = 0; i < n; i += kPanel)
      for (int64_t j0 = 0; j0 < width; j0 += kPanel) {
        const float* const from = strip.panel(j0) + i * kPanel;
        float* const to = data_ + i * d + (first + j0) * kPanel;
        const int64_t rows = n - i < kPanel ? n - i : kPanel, columns = width - j0 < kPanel ? width - j0 : kPanel;
        transpose(from, rows, columns, kPanel, to, kPanel);
        for (int64_t j = 0; j < columns && rows < kPanel; ++j)
          for (int64_t k = rows; k < kPanel; ++k) to[j * kPanel + k] = 0.f;
      }
    for (int64_t i = 0; i < n; ++i) {
      D squares{};
      for_each_vector(width, [&](int64_t j, int) {
        const D v = widen(strip.operand(i, j));
        squares += v * v;
      });
      squares_[first / kStrip * n + i] = sum(squares);
    }
  }
  // On the diagonal: a sum of numbers of one sign, which a float32 sum rounds again and again in one direction.
  float square(int64_t i) const {
    double total = 0.;
    for (int64_t k = i; k < ceil_div(d, kStrip) * n; k += n) total += squares_[k];
    return static_cast<float>(total);
  }
  // Columns from k of rows from i, up to the next multiple of kPanel; of rows from j, a multiple of kPanel.
  Left left(int64_t i, int64_t k) const {
    return {data_ + i / kPanel * kPanel * d + i % kPanel + k * kPanel, 1, kPanel};
  }
  Right right(int64_t j, int64_t k) const { return {data_ + j * d + k * kPanel, kPanel, d * kPanel}; }

  const int64_t n, d;

 private:
  Buffer<float> data_;
  Buffer<double> squares_;  // of each row in each strip
};

// grams [count, rows, N] = rows [first, first + rows) of A A^T for each of one or two views; returns the inner product
// of the two, or of the one with itself. All rows: by symmetry half of the products.
template <int kViews>
double gram(const Transposed* const (&views)[kViews], int64_t first, int64_t rows, float* grams) {
  constexpr int64_t kColumns = 512;  // of both operands at a time, in the second-level cache
  const int64_t n = views[0]->n, d = views[0]->d;
  const bool whole = rows == n;
  const int64_t side = n <= 128 ? 32 : n <= 512 ? 64 : 128, ld = side + 16;
  const int64_t high = (rows + side - 1) / side, wide = (n + side - 1) / side, tiles = high * wide;
  Buffer<double> inner(tiles);
  parallel_tickets(
      tiles, [&] { return Buffer<float>(kViews * side * ld); },
      [&](int64_t ticket, Buffer<float>& s) {
        inner[ticket] = 0.;
        const int64_t i0 = ticket / wide * side, j0 = ticket % wide * side;
        if (whole && j0 < i0) return;
        const int64_t i1 = i0 + side < rows ? i0 + side : rows, j1 = j0 + side < n ? j0 + side : n;
        // Rows that gemm() can take at once, from the diagonal on where they meet it.
        const auto for_each_group = [&](auto&& visit) {
          for (int64_t i = i0; i < i1;) {
            const int64_t next = (first + i) / kPanel * kPanel + kPanel - first, end = next < i1 ? next : i1;
            visit(i, end, whole && i0 == j0 ? i : j0);
            i = end;
          }
        };
        for (int64_t k = 0; k < d; k += kColumns)
          for (int v = 0; v < kViews; ++v)
            for_each_group([&](int64_t i, int64_t end, int64_t from) {
              gemm(end - i, j1 - from, d - k < kColumns ? d - k : kColumns, views[v]->left(first + i, k),
                   views[v]->right(from, k), s + (v * side + i - i0) * ld + from - j0, ld, k > 0);
            });
        double total = 0.;
        for_each_group([&](int64_t i, int64_t end, int64_t from) {
          for (int64_t r = i; r < end; ++r)
            for (int v = 0; v < kViews && first + r >= from && first + r < j1; ++v)
              s[(v * side + r - i0) * ld + first + r - j0] = views[v]->square(first + r);
          // Up to here each product stands for itself, then also for its mirror image.
          const int64_t once = !whole ? j1 : i0 == j0 ? (end < j1 ? end : j1) : from;
          for (int64_t r = i; r < end; ++r) {
            const float *const a = s + (r - i0) * ld, *const b = a + (kViews - 1) * side * ld;
            const auto product = [&](int64_t begin, int64_t until) {
              D sums{};
              for_each_vector(until - begin, [&](int64_t j, int lanes) {
                sums += widen(load_lanes(a + begin - j0 + j, lanes, 0.f)) *
                        widen(load_lanes(b + begin - j0 + j, lanes, 0.f));
              });
              return sum(sums);
            };
            total += product(from, once) + 2. * product(once, j1);
            for (int v = 0; v < kViews; ++v) {
              float* const to = grams + v * rows * n;
              const float* const row = v ? b : a;
              std::memcpy(to + r * n + from, row + from - j0, (j1 - from) * sizeof(float));
              for (int64_t j = once; j < j1; ++j) to[j * n + r] = row[j - j0];
            }
          }
        });
        inner[ticket] = total;
      });
  double total = 0.;
  for (int64_t k = 0; k < tiles; ++k) total += inner[k];
  return total;
}

// Whether what is off the diagonal, a difference of sums of squares that a Gram matrix knows, keeps its digits: false
// where few columns are alive or hold most of the variance, and for NaN.
inline bool keeps_digits(double of_diagonal, double of_all) { return of_diagonal <= 0.9 * of_all; }

}  // namespace
}  // namespace sslops
