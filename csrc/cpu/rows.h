// Rows of embeddings: their norms, the way back through F.normalize, and sums over rows whose order does not depend on
// the threads.
#pragma once
#include <cstdint>

#include "../common/parallel.h"
#include "../common/tensor.h"
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
  in_chains(d, [&](int64_t j, int k, int lanes) {
    const F v = load_as_float(x, dtype, offset + j, lanes);
    squares[k] += v * v;
  });
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

// [.., D] as they are stored, beside the 1 / norm of each, 1 where they are not normalised.
struct Rows {
  const void* x;
  DType dtype;
  int64_t d;
  bool normalize;
  const float* inv_norm;

  Rows(const Tensor& x, bool normalize, const float* inv_norm)
      : x(x.data), dtype(x.dtype), d(x.sizes[x.dim - 1]), normalize(normalize), inv_norm(inv_norm) {}

  // Of the unit row, unrounded.
  SSLOPS_INLINE F at(int64_t i, int64_t j, int lanes) const {
    return load_as_float(x, dtype, i * d + j, lanes) * inv_norm[i];
  }
  bool finite(int64_t i) const {
    F zero{};
    for_each_vector(d, [&](int64_t j, int lanes) { zero += load_as_float(x, dtype, i * d + j, lanes) * 0.f; });
    return sum(zero) == 0.f;
  }
  float norm_of(int64_t i) const { return normalize ? sslops::inv_norm(x, dtype, i * d, d) : 1.f; }

  // v [d], the gradient of unit row i, becomes that of the row as it is stored, in row `to` of out. Returns <row, v>.
  SSLOPS_INLINE float backward(int64_t i, const float* v, const Tensor& out, int64_t to) const {
    F product{};
    for_each_vector(d, [&](int64_t j, int lanes) { product += at(i, j, lanes) * load_lanes(v + j, lanes, 0.f); });
    const float dot = sum(product), inv = inv_norm[i];
    // At a clamped norm F.normalize is a plain scaling: nothing to project out.
    const bool project = normalize && inv < 1.f / kNormEps;
    for_each_vector(d, [&](int64_t j, int lanes) {
      F g = load_lanes(v + j, lanes, 0.f);
      if (project) g -= at(i, j, lanes) * dot;
      store_from_float(out.data, out.dtype, to * d + j, lanes, g * inv);
    });
    return dot;
  }
};

}  // namespace
}  // namespace sslops
