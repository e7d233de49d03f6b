#include "launch.cuh"
#include "multi_block_mask.h"

namespace sslops::multi_block_mask {
namespace {

constexpr unsigned kWarp = 32, kAll = 0xffffffffu;
static_assert(kTargets <= static_cast<int>(kWarp), "a lane draws a target");

// The tokens of a block that are in none of the targets: how many they are, and which if there is room for `most`, with
// zeros behind them.
__device__ int64_t list(const Grid& g, const Block& block, const Block* targets, int64_t count, int64_t most,
                        int64_t* ids) {
  const unsigned lane = threadIdx.x;
  const int64_t size = block.height * block.width;
  int64_t found = 0;
  for (int64_t first = 0; first < size; first += kWarp) {
    const int64_t k = first + lane, r = block.top + k / block.width, c = block.left + k % block.width;
    const bool own = k < size && is_free(targets, count, r, c);
    const unsigned all = __ballot_sync(kAll, own);
    if (own) ids[found + __popc(all & ((1u << lane) - 1))] = r * g.width + c;
    found += __popc(all);
  }
  for (int64_t k = found + lane; k < most; k += kWarp) ids[k] = 0;
  return found;
}

__global__ void __launch_bounds__(kWarp) draw_row(Grid g, const uint64_t* key, Masks out) {
  __shared__ Block targets[kTargets];
  const int64_t row = blockIdx.x, lane = threadIdx.x;
  if (lane < g.targets) targets[lane] = target_of(g, *key, row, lane);
  __syncthreads();
  for (int64_t k = 0; k < g.targets; ++k) {
    const int64_t at = k * out.batch + row;
    const int64_t count = list(g, targets[k], nullptr, 0, out.most_target, out.ids_targets + at * out.most_target);
    if (lane == 0) out.target_counts[at] = count;
  }
  int64_t count = 0;
  for (int64_t k = 0; k < tries(g); ++k) {
    __syncthreads();  // the zeros of the last try are in memory
    count = list(g, context_of(g, *key, row, k), targets, taken_out(g, k), out.most_context,
                 out.ids_context + row * out.most_context);
    if (count >= g.min_keep) break;
  }
  if (lane == 0) out.context_counts[row] = count;
}

}  // namespace

void cuda_draw(const Grid& grid, const uint64_t* key, const Masks& out, void* stream) {
  if (out.batch > 0) launch(draw_row, out.batch, kWarp, stream, grid, key, out);
}

const CudaTable& cuda_table() {
  static constexpr CudaTable table{[](Tensor key, int64_t height, int64_t width, int64_t targets, int64_t min_keep,
                                      Tensor ranges, Tensor ids_context, Tensor context_counts, Tensor ids_targets,
                                      Tensor target_counts, Stream stream) {
    cuda_draw(grid_of(height, width, targets, min_keep, ranges), key.as<uint64_t>(),
              masks_of(ids_context, context_counts, ids_targets, target_counts), stream.handle);
  }};
  return table;
}

}  // namespace sslops::multi_block_mask
