// Squares of numbers turned over in registers.
#pragma once
#include <utility>

#include "vec.h"

namespace sslops {
namespace {

// a[kFirst], b[kFirst], a[kFirst + 1], b[kFirst + 1], ..
template <int kFirst, int... kLane>
SSLOPS_INLINE F interleaved(F a, F b, std::integer_sequence<int, kLane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (kFirst + kLane / 2 + kLane % 2 * kLanes)...);
#else  // GCC has that name from version 12 on
  return __builtin_shuffle(a, b, I{(kFirst + kLane / 2 + kLane % 2 * kLanes)...});
#endif
}

// Rounds of interleaving the first half with the second.
SSLOPS_INLINE void transpose(F (&v)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    F w[kLanes];
#pragma GCC unroll 8
    for (int k = 0; k < kLanes / 2; ++k) {
      w[2 * k] = interleaved<0>(v[k], v[k + kLanes / 2], lanes);
      w[2 * k + 1] = interleaved<kLanes / 2>(v[k], v[k + kLanes / 2], lanes);
    }
#pragma GCC unroll 16
    for (int k = 0; k < kLanes; ++k) v[k] = w[k];
  }
}

// to [q, p] = w^T, w [p, q]
inline void transpose(const float* w, int64_t p, int64_t q, int64_t ld, float* to, int64_t ld_to) {
  int64_t i = 0;
  for (; i + kLanes <= p; i += kLanes)
    for_each_vector(q, [&](int64_t j, int lanes) {
      F v[kLanes];
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) v[k] = load_lanes(w + (i + k) * ld + j, lanes, 0.f);
      transpose(v);
      if (lanes == kLanes) {
#pragma GCC unroll 16
        for (int k = 0; k < kLanes; ++k) store(to + (j + k) * ld_to + i, v[k]);
      } else {
        for (int k = 0; k < lanes; ++k) store(to + (j + k) * ld_to + i, v[k]);
      }
    });
  for (; i < p; ++i)
    for (int64_t j = 0; j < q; ++j) to[j * ld_to + i] = w[i * ld + j];
}

}  // namespace
}  // namespace sslops
