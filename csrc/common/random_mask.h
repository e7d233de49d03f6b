// Random masks: which noise decides on a token's rank in its row, and how it is ordered.
#pragma once
#include <cstdint>

#include "bits.h"
#include "host_device.h"
#include "philox.h"
#include "tensor.h"

namespace sslops::random_mask {

// Given, or from Philox under the key, four positions of a row to a block. The first num_prefix tokens come first.
struct Noise {
  const float* values;  // [B, L], or null
  const uint64_t* key;
  int64_t length, num_prefix;
};

// Token j of row b goes to the place that is its rank: the first `keep` are kept.
struct Mask {
  int64_t keep;
  int64_t *ids_keep, *ids_mask, *ids_restore;  // [B, keep], [B, L - keep], [B, L]
  float* mask;                                 // [B, L]: 1 for masked
};

// Of given noise [B, L], or a key [], for ids_restore [B, L].
SSLOPS_HOST Noise noise_of(const Tensor& noise, int64_t num_prefix, const Tensor& ids_restore) {
  const bool given = noise.dim > 0;
  return {given ? noise.as<float>() : nullptr, given ? nullptr : noise.as<uint64_t>(), ids_restore.sizes[1],
          num_prefix};
}

SSLOPS_HOST Mask mask_of(const Tensor& ids_keep, const Tensor& ids_mask, const Tensor& mask,
                         const Tensor& ids_restore) {
  return {ids_keep.sizes[1], ids_keep.as<int64_t>(), ids_mask.as<int64_t>(), ids_restore.as<int64_t>(),
          mask.as<float>()};
}

// Integers in the order of the noise: zeros are equal, NaN comes last.
constexpr int32_t kFirst = INT32_MIN, kLast = INT32_MAX;

SSLOPS_HOST_DEVICE int32_t order(float x) {
  const int32_t b = static_cast<int32_t>(bits(x + 0.f));
  return x == x ? b ^ (b >> 31 & kLast) : kLast;
}

SSLOPS_HOST_DEVICE uint64_t first_block(int64_t length, int64_t row) {
  return static_cast<uint64_t>(row * ((length + 3) / 4));
}
SSLOPS_HOST_DEVICE Random4 draw(uint64_t key, int64_t length, int64_t row, int64_t block) {
  return philox(key, first_block(length, row) + block, RandomStream::random_mask);
}

SSLOPS_HOST_DEVICE void place(const Mask& m, int64_t length, int64_t row, int64_t j, int64_t rank) {
  const bool kept = rank < m.keep;
  *(kept ? m.ids_keep + row * m.keep + rank : m.ids_mask + row * (length - m.keep) + rank - m.keep) = j;
  m.ids_restore[row * length + j] = rank;
  m.mask[row * length + j] = kept ? 0.f : 1.f;
}

}  // namespace sslops::random_mask
