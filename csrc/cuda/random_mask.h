// Random masks on a CUDA device: one launch.
#pragma once
#include "../common/bound.h"
#include "../common/random_mask.h"

namespace sslops::random_mask {

// Throws std::runtime_error with CUDA's reason where the launch fails.
void cuda_draw(const Noise& noise, int64_t batch, const Mask& out, void* stream);

// What Python calls, on the stream it gives.
struct CudaTable {
  void (*draw)(Tensor noise, int64_t num_prefix, Tensor lengths, Tensor counts, int64_t blocks, int64_t size,
               int64_t width, bool first, Tensor ids_keep, Tensor ids_mask, Tensor mask, Tensor ids_restore,
               Stream stream);

  static constexpr auto bound() { return std::tuple{Bound{"cuda_random_mask", &CudaTable::draw}}; }
};
const CudaTable& cuda_table();

}  // namespace sslops::random_mask
