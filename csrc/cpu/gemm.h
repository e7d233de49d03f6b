// float32 matrix products for one thread, on operands that lie in its caches: C [m, n] (+)= A [m, k] B [k, n].
// Every sum runs over k in order, kTerms numbers a part, with fused multiply-adds where there are any: the result does
// not depend on m, n or the threads, and long sums do not gather the roundings of all their terms.
#pragma once
#include "vec.h"

namespace sslops {
namespace {

constexpr int kVectors = 2, kPanel = kVectors * kLanes;  // columns of C that stay in registers
constexpr int kRows = kLanes == 16 ? 8 : 6;              // ... and rows: as many as there are registers for
constexpr int64_t kDepth = 4096 / kPanel;                // of B at a time: 16 KiB, half of a first-level cache
constexpr int64_t kTerms = 128;                          // ... and of a sum, whatever the ISA: its digits depend on it
constexpr int64_t kAhead = 16;                           // steps of a sum that operands are fetched before

// a(i, k) = data[i * row + k * column]
struct Left {
  const float* data;
  int64_t row, column;
};

// Panels of kPanel columns, `panel` apart, the rows of each `row` apart; zeros (or whatever C may hold there) beyond n,
// up to whole vectors.
struct Right {
  const float* data;
  int64_t row, panel;
};

template <int kM, int kN>
SSLOPS_INLINE void micro(int64_t depth, Left a, const float* b, int64_t b_row, float* c, int64_t ldc, bool add) {
  F sums[kM][kN];
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kN * kLanes && add; j += 16) __builtin_prefetch(c + i * ldc + j, 1);  // wanted in the end
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) sums[i][j] = F{};
  }
  for (int64_t k = 0; k < depth; ++k, a.data += a.column, b += b_row) {
    if constexpr (kM == kRows) {  // rows of a matrix, that the processor does not foresee
      __builtin_prefetch(a.data + kAhead * a.column);
      __builtin_prefetch(b + kAhead * b_row);
    }
    F right[kN];
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
      const F left = splat(a.data[i * a.row]);
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) {
      float* const to = c + i * ldc + j * kLanes;
      store(to, add ? load(to) + sums[i][j] : sums[i][j]);
    }
}

// Of up to kRows rows.
template <int kM, int kN>
void few_rows(int64_t m, int64_t depth, Left a, const float* b, int64_t b_row, float* c, int64_t ldc, bool add) {
  if constexpr (kM > 0) {
    if (m == kM) return micro<kM, kN>(depth, a, b, b_row, c, ldc, add);
    few_rows<kM - 1, kN>(m, depth, a, b, b_row, c, ldc, add);
  }
}

template <int kN>
SSLOPS_INLINE void panel(int64_t m, int64_t depth, Left a, const float* b, int64_t b_row, float* c, int64_t ldc,
                         bool add) {
  const auto at = [&](int64_t i) { return Left{a.data + i * a.row, a.row, a.column}; };
  int64_t i = 0;
  for (; m - i == kRows || m - i >= 2 * kRows; i += kRows)
    micro<kRows, kN>(depth, at(i), b, b_row, c + i * ldc, ldc, add);
  // In halves: sums of one or two rows are too few to be added to in every cycle.
  for (int64_t rows; i < m; i += rows) {
    rows = m - i > kRows ? (m - i + 1) / 2 : m - i;
    few_rows<kRows, kN>(rows, depth, at(i), b, b_row, c + i * ldc, ldc, add);
  }
}

// C's rows are written up to whole vectors.
__attribute__((noinline)) void gemm(int64_t m, int64_t n, int64_t k, Left a, Right b, float* c, int64_t ldc, bool add) {
  for (int64_t from = 0; from < k || (from == 0 && !add); from += kDepth)
    for (int64_t j = 0; j < n; j += kPanel)
      for (int64_t part = from; part < at_most(k, from + kDepth) || (part == 0 && !add); part += kTerms) {
        const int64_t depth = at_most(k - part, kTerms);
        const Left left{a.data + part * a.column, a.row, a.column};
        const float* const right = b.data + j / kPanel * b.panel + part * b.row;
        if (n - j > kLanes)
          panel<kVectors>(m, depth, left, right, b.row, c + j, ldc, add || part > 0);
        else
          panel<1>(m, depth, left, right, b.row, c + j, ldc, add || part > 0);
      }
}

}  // namespace
}  // namespace sslops
