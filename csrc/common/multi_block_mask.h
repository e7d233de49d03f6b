// I-JEPA's masks of a grid of tokens: blocks that are to be predicted, and one that they are predicted from, less them.
#pragma once
#include <math.h>

#include <cstdint>

#include "host_device.h"
#include "philox.h"
#include "tensor.h"

namespace sslops::multi_block_mask {

constexpr int kTargets = 32;  // at most
constexpr int kTries = 20;    // of a context, before it may overlap one target more
constexpr int64_t kOne = 1 << 24;

// Fixed-point numbers, in units of 1 / kOne: what is drawn of them is the same everywhere.
struct Range {
  int64_t low, span;
};

struct Grid {
  int64_t height, width, targets, min_keep;
  Range target_scale, aspect, context_scale;
};

struct Block {
  int64_t top, left, height, width;
};

// ids are 0 behind their counts.
struct Masks {
  int64_t batch, most_context, most_target;
  int64_t *ids_context, *context_counts;  // [B, most_context], [B]
  int64_t *ids_targets, *target_counts;   // [T, B, most_target], [T, B]
};

// ranges [3, 2]: in the host's memory.
SSLOPS_HOST Grid grid_of(int64_t height, int64_t width, int64_t targets, int64_t min_keep, const Tensor& ranges) {
  const int64_t* const r = ranges.as<int64_t>();
  return {height, width, targets, min_keep, {r[0], r[1]}, {r[2], r[3]}, {r[4], r[5]}};
}

SSLOPS_HOST Masks masks_of(const Tensor& ids_context, const Tensor& context_counts, const Tensor& ids_targets,
                           const Tensor& target_counts) {
  return {ids_context.sizes[0],       ids_context.sizes[1],         ids_targets.sizes[2],
          ids_context.as<int64_t>(),  context_counts.as<int64_t>(), ids_targets.as<int64_t>(),
          target_counts.as<int64_t>()};
}

SSLOPS_HOST_DEVICE int64_t scaled(uint32_t word, int64_t span) {
  return static_cast<int64_t>(word * static_cast<uint64_t>(span) >> 32);
}

SSLOPS_HOST_DEVICE int64_t rounded_root(double x, int64_t most) {
  const int64_t root = static_cast<int64_t>(sqrt(x) + 0.5);
  return root < 1 ? 1 : root < most ? root : most;
}

// Of area, aspect, row and column a word each. No product is added to anything: nothing here can be contracted.
SSLOPS_HOST_DEVICE Block block_of(const Grid& g, const Range& scale, const Range& aspect, const Random4& random) {
  const int64_t area = g.height * g.width * (scale.low + scaled(random.word[0], scale.span)) / kOne;
  const int64_t ratio = aspect.low + scaled(random.word[1], aspect.span);
  const int64_t height = rounded_root(static_cast<double>(area * ratio) / kOne, g.height);
  const int64_t width = rounded_root(static_cast<double>(area * kOne) / static_cast<double>(ratio), g.width);
  return {scaled(random.word[2], g.height - height + 1), scaled(random.word[3], g.width - width + 1), height, width};
}

SSLOPS_HOST_DEVICE int64_t tries(const Grid& g) { return kTries * (g.targets + 1); }
SSLOPS_HOST_DEVICE Random4 draw(const Grid& g, uint64_t key, int64_t row, int64_t block) {
  const uint64_t first = static_cast<uint64_t>(row * (g.targets + tries(g)));
  return philox(key, first + block, RandomStream::multi_block_mask);
}
SSLOPS_HOST_DEVICE Block target_of(const Grid& g, uint64_t key, int64_t row, int64_t k) {
  return block_of(g, g.target_scale, g.aspect, draw(g, key, row, k));
}
SSLOPS_HOST_DEVICE Block context_of(const Grid& g, uint64_t key, int64_t row, int64_t attempt) {
  return block_of(g, g.context_scale, {kOne, 0}, draw(g, key, row, g.targets + attempt));
}

// How many of the targets, the first ones, are taken out of the context.
SSLOPS_HOST_DEVICE int64_t taken_out(const Grid& g, int64_t attempt) { return g.targets - attempt / kTries; }

SSLOPS_HOST_DEVICE bool inside(const Block& b, int64_t row, int64_t column) {
  return row >= b.top && row < b.top + b.height && column >= b.left && column < b.left + b.width;
}
SSLOPS_HOST_DEVICE bool is_free(const Block* targets, int64_t count, int64_t row, int64_t column) {
  for (int64_t k = 0; k < count; ++k)
    if (inside(targets[k], row, column)) return false;
  return true;
}

}  // namespace sslops::multi_block_mask
