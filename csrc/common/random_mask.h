// Random masks: which noise decides on a token's rank in its row, and how it is ordered.
#pragma once
#include <cstdint>

#include "bits.h"
#include "counts.h"
#include "host_device.h"
#include "philox.h"
#include "tensor.h"

namespace sslops::random_mask {

// Squares of a grid of tokens around drawn centers, cut off at its edges. The tokens in any come first, or else last.
struct Blocks {
  int64_t count, size, width;  // how many, 0: none; of a side; of the grid, row by row of which the tokens lie
  bool first;
};

// Given, or from Philox under the key, four positions of a row to a block. The first num_prefix tokens come first.
struct Noise {
  const float* values;  // [B, L], or null
  const uint64_t* key;
  int64_t length, num_prefix;
  const int64_t* lengths;  // [B]: of a row's tokens, behind which there is padding; or null: all L
  Blocks blocks;           // of drawn noise
};

// Token j of row b goes to the place that is its rank, padding behind all: the first counts[b] are kept, at most
// `keep`.
struct Mask {
  int64_t keep;
  int64_t *ids_keep, *ids_mask, *ids_restore;  // [B, keep], [B, L - keep], [B, L]
  float* mask;                                 // [B, L]: 1 for masked
  const int64_t* counts;                       // or null: `keep`
};

// Of given noise [B, L], or a key [], for ids_restore [B, L].
SSLOPS_HOST Noise noise_of(const Tensor& noise, int64_t num_prefix, const Tensor& lengths, const Blocks& blocks,
                           const Tensor& ids_restore) {
  const bool given = noise.dim > 0;
  return {given ? noise.as<float>() : nullptr,
          given ? nullptr : noise.as<uint64_t>(),
          ids_restore.sizes[1],
          num_prefix,
          lengths.as<int64_t>(),
          blocks};
}

SSLOPS_HOST Mask mask_of(const Tensor& counts, const Tensor& ids_keep, const Tensor& ids_mask, const Tensor& mask,
                         const Tensor& ids_restore) {
  return {ids_keep.sizes[1],         ids_keep.as<int64_t>(), ids_mask.as<int64_t>(),
          ids_restore.as<int64_t>(), mask.as<float>(),       counts.as<int64_t>()};
}

// How many tokens a row has, and how many of them it keeps.
struct Share {
  int64_t tokens, kept;
};
SSLOPS_HOST_DEVICE Share share_of(const Noise& noise, const Mask& m, int64_t row) {
  const int64_t tokens = count_of(noise.lengths, row, noise.length);
  return {tokens, count_of(m.counts, row, tokens < m.keep ? tokens : m.keep)};
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

// Where the centers of a row's squares are: a word each.
SSLOPS_HOST_DEVICE Random4 draw_centers(const Noise& noise, int64_t row, int64_t four) {
  const uint64_t first = static_cast<uint64_t>(row * ((noise.blocks.count + 3) / 4));
  return philox(*noise.key, first + four, RandomStream::mask_blocks);
}
SSLOPS_HOST_DEVICE int64_t center_of(const Noise& noise, uint32_t word) {
  return static_cast<int64_t>(word * static_cast<uint64_t>(noise.length) >> 32);
}

// Slots of ids_keep that no token is kept for are 0.
SSLOPS_HOST_DEVICE void place(const Mask& m, const Share& share, int64_t length, int64_t row, int64_t j, int64_t rank) {
  const bool kept = rank < share.kept, slot = rank < m.keep;
  *(slot ? m.ids_keep + row * m.keep + rank : m.ids_mask + row * (length - m.keep) + rank - m.keep) =
      kept || !slot ? j : 0;
  m.ids_restore[row * length + j] = rank;
  m.mask[row * length + j] = kept || rank >= share.tokens ? 0.f : 1.f;
}

}  // namespace sslops::random_mask
