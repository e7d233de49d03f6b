// What several ops do with the rows of a matrix: their norms, and sums over them whose order does not depend on the
// threads.
#pragma once
#include <cstdint>

#include "../common/parallel.h"
#include "vec.h"

namespace sslops {
namespace {

template <typename Row>
double sum_rows(int64_t rows, Row&& row) {
  constexpr int64_t kBatch = 1024;
  double part[kBatch], total = 0.;
  for (int64_t first = 0; first < rows; first += kBatch) {
    const int64_t batch = rows - first < kBatch ? rows - first : kBatch;
    parallel_for(batch, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) part[i] = row(first + i);
    });
    for (int64_t i = 0; i < batch; ++i) total += part[i];
  }
  return total;
}

constexpr float kNormEps = 1e-12f;  // F.normalize's

// 1 / max(|x|, eps) of d values from `offset` on. Squares are summed in float32, lane by lane, and in double where they
// leave its range; all else is double, for an error here shifts all logits of a column.
SSLOPS_INLINE float inv_norm(const void* x, DType dtype, int64_t offset, int64_t d) {
  F squares[4]{};
  int64_t j = 0;
  for (; j + 4 * kLanes <= d; j += 4 * kLanes)
    for (int k = 0; k < 4; ++k) {
      const F v = load_as_float(x, dtype, offset + j + k * kLanes, kLanes);
      squares[k] += v * v;
    }
  for (; j < d; j += kLanes) {
    const F v = load_as_float(x, dtype, offset + j, d - j < kLanes ? static_cast<int>(d - j) : kLanes);
    squares[0] += v * v;
  }
  double total = sum(__builtin_convertvector((squares[0] + squares[1]) + (squares[2] + squares[3]), D));
  if (!(total > 1e-20 && total < 1e30)) {
    D wide{};
    for_each_vector(d, [&](int64_t k, int lanes) {
      const D v = __builtin_convertvector(load_as_float(x, dtype, offset + k, lanes), D);
      wide += v * v;
    });
    total = sum(wide);
  }
  const double norm = __builtin_sqrt(total);
  return static_cast<float>(1.0 / (norm < kNormEps ? static_cast<double>(kNormEps) : norm));
}

}  // namespace
}  // namespace sslops
