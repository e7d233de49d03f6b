// BERT's masking on a CUDA device: one launch.
#pragma once
#include "../common/bound.h"
#include "../common/random_token_corruption.h"

namespace sslops::random_token_corruption {

// key: on the device.
void cuda_corrupt(const Tokens& tokens, const uint64_t* key, int64_t* corrupted, int64_t* labels, void* stream);

// What Python calls, on the stream it gives.
struct CudaTable {
  void (*corrupt)(Tensor ids, Tensor special, Tensor units, Tensor key, Tensor runs, Tensor begun, int64_t row,
                  int64_t drawn, int64_t mask_id, uint64_t masked, uint64_t masked_or_random, Tensor corrupted,
                  Tensor labels, Stream stream);

  static constexpr auto bound() { return std::tuple{Bound{"cuda_random_token_corruption", &CudaTable::corrupt}}; }
};
const CudaTable& cuda_table();

}  // namespace sslops::random_token_corruption
