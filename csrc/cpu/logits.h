// Rows of logits y = x / tau + b over many prototypes, in tiles that stay in the first cache: each tile's exponentials
// relative to its own maximum, so that a row is read from memory once.
#pragma once
#include "buffer.h"
#include "softmax.h"
#include "vec.h"

namespace sslops {
namespace {

constexpr int64_t kTile = 2048;

// A row as it is stored.
struct Row {
  const char* data;
  DType dtype;
};

// y [n, to whole vectors], the lowest number behind n; returns the maximum. bias may be null.
template <DType kType, bool kBias>
float scale_tile(const char* x, int64_t first, int64_t n, float inverse, const float* bias, float* y) {
  F top[4] = {splat(kLowest), splat(kLowest), splat(kLowest), splat(kLowest)};
  const auto one = [&](int64_t j, int lanes, F& best) {
    F v = load_as_float(x, kType, first + j, lanes) * inverse;
    if (kBias) v += load_lanes(bias + first + j, lanes, 0.f);
    if (lanes < kLanes) {
      F padded = splat(kLowest);
      std::memcpy(&padded, &v, lanes * sizeof(float));
      v = padded;
    }
    best = max(v, best);
    store(y + j, v);
  };
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes)
    for (int k = 0; k < 4; ++k) one(j + k * kLanes, kLanes, top[k]);
  for_each_vector(n - j, [&](int64_t i, int lanes) { one(j + i, lanes, top[0]); });
  return max(max(max(top[0], top[1]), max(top[2], top[3])));
}
inline float scale_tile(const Row& x, int64_t first, int64_t n, float inverse, const float* bias, float* y) {
  const auto run = x.dtype == DType::f32    ? (bias ? scale_tile<DType::f32, true> : scale_tile<DType::f32, false>)
                   : x.dtype == DType::bf16 ? (bias ? scale_tile<DType::bf16, true> : scale_tile<DType::bf16, false>)
                                            : (bias ? scale_tile<DType::f16, true> : scale_tile<DType::f16, false>);
  return run(x.data, first, n, inverse, bias, y);
}

// visit(j, k, y - top, e^(y - top)) over a tile in vectors, for four chains of sums k = 0 .. 3. Meanwhile the bytes at
// `next`, of the tile to come, are fetched.
template <typename Visit>
SSLOPS_INLINE void exponentials(const float* y, int64_t n, float top, const char* next, Visit&& visit) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes)
    for (int k = 0; k < 4; ++k) {
      if (k % (16 / kLanes) == 0) __builtin_prefetch(next + (j + k * kLanes) * sizeof(float));
      const F d = load(y + j + k * kLanes) - top;
      visit(j + k * kLanes, k, d, exp_nonpositive(d));
    }
  for (; j < n; j += kLanes) {
    const F d = load(y + j) - top;
    visit(j, 0, d, exp_nonpositive(d));
  }
}
SSLOPS_INLINE float sum(const F (&chains)[4]) { return sum((chains[0] + chains[1]) + (chains[2] + chains[3])); }

constexpr int64_t tiles_of(int64_t k) { return (k + kTile - 1) / kTile; }

}  // namespace
}  // namespace sslops
