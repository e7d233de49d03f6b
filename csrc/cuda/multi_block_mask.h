// I-JEPA's masks on a CUDA device: a warp for each row.
#pragma once
#include "../common/bound.h"
#include "../common/multi_block_mask.h"

namespace sslops::multi_block_mask {

// Throws std::runtime_error with CUDA's reason where the launch fails.
void cuda_draw(const Grid& grid, const uint64_t* key, const Masks& out, void* stream);

// What Python calls, on the stream it gives.
struct CudaTable {
  void (*draw)(Tensor key, int64_t height, int64_t width, int64_t targets, int64_t min_keep, Tensor ranges,
               Tensor ids_context, Tensor context_counts, Tensor ids_targets, Tensor target_counts, Stream stream);

  static constexpr auto bound() { return std::tuple{Bound{"cuda_multi_block_mask", &CudaTable::draw}}; }
};
const CudaTable& cuda_table();

}  // namespace sslops::multi_block_mask
