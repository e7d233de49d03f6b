// Rows of logits over many prototypes, in tiles that stay in the first cache: each tile's exponentials are relative to
// its own maximum, so that a row is read from memory once.
#pragma once
#include "buffer.h"
#include "softmax.h"
#include "vec.h"

namespace sslops {
namespace {

constexpr int64_t kTile = 2048;

// For chain k: of what in_chains reads next, the tile behind this one, a cache line a time.
SSLOPS_INLINE void prefetch(const char* next, int64_t j, int k, int64_t item) {
  if (k % (16 / kLanes) == 0) __builtin_prefetch(next + j * item);
}

// v, and behind its lanes `fill`.
SSLOPS_INLINE F filled(F v, int lanes, float fill) {
  return lanes == kLanes ? v : select(below(lanes), v, splat(fill));
}

// The maximum of at(j, lanes) over n elements.
template <typename At>
SSLOPS_INLINE float largest(int64_t n, At&& at) {
  F top[4] = {splat(kLowest), splat(kLowest), splat(kLowest), splat(kLowest)};
  in_chains(n, [&](int64_t j, int k, int lanes) { top[k] = max(filled(at(j, lanes), lanes, kLowest), top[k]); });
  return max(max(max(top[0], top[1]), max(top[2], top[3])));
}

constexpr int64_t tiles_of(int64_t k) { return (k + kTile - 1) / kTile; }

}  // namespace
}  // namespace sslops
