#include "multi_block_mask.h"

#include <cstring>

#include "../common/parallel.h"

namespace sslops::multi_block_mask {
namespace {

constexpr int64_t kThreadRows = 16;

// The tokens of a block that are in none of the targets, and zeros behind them; how many they are.
int64_t list(const Grid& g, const Block& block, const Block* targets, int64_t count, int64_t most, int64_t* ids) {
  int64_t found = 0;
  for (int64_t r = block.top; r < block.top + block.height; ++r)
    for (int64_t c = block.left; c < block.left + block.width; ++c)
      if (is_free(targets, count, r, c)) ids[found++] = r * g.width + c;
  std::memset(ids + found, 0, (most - found) * sizeof *ids);
  return found;
}

void draw_masks(const Grid& g, const uint64_t* key, const Masks& out) {
  parallel_for(out.batch, kThreadRows, [&](int64_t begin, int64_t end) {
    Block targets[kTargets];
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t k = 0; k < g.targets; ++k) {
        const int64_t at = k * out.batch + row;
        targets[k] = target_of(g, *key, row, k);
        out.target_counts[at] =
            list(g, targets[k], nullptr, 0, out.most_target, out.ids_targets + at * out.most_target);
      }
      int64_t& count = out.context_counts[row];
      for (int64_t k = 0; k < tries(g); ++k) {
        count = list(g, context_of(g, *key, row, k), targets, taken_out(g, k), out.most_context,
                     out.ids_context + row * out.most_context);
        if (count >= g.min_keep) break;
      }
    }
  });
}

void call(Tensor key, int64_t height, int64_t width, int64_t targets, int64_t min_keep, Tensor ranges,
          Tensor ids_context, Tensor context_counts, Tensor ids_targets, Tensor target_counts) {
  draw_masks(grid_of(height, width, targets, min_keep, ranges), key.as<uint64_t>(),
             masks_of(ids_context, context_counts, ids_targets, target_counts));
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{draw_masks, call};
}

}  // namespace sslops::multi_block_mask
