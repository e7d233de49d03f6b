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

// visit(j, k, lanes) over n elements in vectors, for four chains k = 0 .. 3 of sums or maxima.
template <typename Visit>
SSLOPS_INLINE void in_chains(int64_t n, Visit&& visit) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes)
    for (int k = 0; k < 4; ++k) visit(j + k * kLanes, k, kLanes);
  for_each_vector(n - j, [&](int64_t i, int lanes) { visit(j + i, 0, lanes); });
}
SSLOPS_INLINE float sum(const F (&chains)[4]) { return sum((chains[0] + chains[1]) + (chains[2] + chains[3])); }

// For chain k: of what in_chains reads next, the tile behind this one, a cache line a time.
SSLOPS_INLINE void prefetch(const char* next, int64_t j, int k, int64_t item) {
  if (k % (16 / kLanes) == 0) __builtin_prefetch(next + j * item);
}

// v, and behind its lanes `fill`.
SSLOPS_INLINE F filled(F v, int lanes, float fill) {
  if (lanes == kLanes) return v;
  F found = splat(fill);
  std::memcpy(&found, &v, lanes * sizeof(float));
  return found;
}

// The maximum of at(j, lanes) over n elements.
template <typename At>
SSLOPS_INLINE float largest(int64_t n, At&& at) {
  F top[4] = {splat(kLowest), splat(kLowest), splat(kLowest), splat(kLowest)};
  in_chains(n, [&](int64_t j, int k, int lanes) { top[k] = max(filled(at(j, lanes), lanes, kLowest), top[k]); });
  return max(max(max(top[0], top[1]), max(top[2], top[3])));
}

// y [n, to whole vectors], the lowest number behind n; returns the maximum. bias may be null.
template <DType kType, bool kBias>
float scale_tile(const char* x, int64_t first, int64_t n, float inverse, const float* bias, float* y) {
  return largest(n, [&](int64_t j, int lanes) {
    F v = load_as_float(x, kType, first + j, lanes) * inverse;
    if (kBias) v += load_lanes(bias + first + j, lanes, 0.f);
    v = filled(v, lanes, kLowest);
    store(y + j, v);
    return v;
  });
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
  in_chains(n, [&](int64_t j, int k, int) {
    prefetch(next, j, k, sizeof(float));
    const F d = load(y + j) - top;
    visit(j, k, d, exp_nonpositive(d));
  });
}

constexpr int64_t tiles_of(int64_t k) { return (k + kTile - 1) / kTile; }

}  // namespace
}  // namespace sslops
