#include "launch.cuh"
#include "random_token_corruption.h"

namespace sslops::random_token_corruption {
namespace {

constexpr unsigned kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    corrupt_one(Tokens tokens, Odds odds, const uint64_t* key, int64_t* corrupted, int64_t* labels) {
  const int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (k < tokens.count) corrupt(tokens, odds, draw(*key, k), k, corrupted, labels);
}

}  // namespace

void cuda_corrupt(const Tokens& tokens, const Odds& odds, const uint64_t* key, int64_t* corrupted, int64_t* labels,
                  void* stream) {
  const int64_t blocks = (tokens.count + kThreads - 1) / kThreads;
  if (blocks > 0) launch(corrupt_one, blocks, kThreads, stream, tokens, odds, key, corrupted, labels);
}

const CudaTable& cuda_table() {
  static constexpr CudaTable table{[](Tensor ids, Tensor special, Tensor key, int64_t mask_id, int64_t vocab_size,
                                      uint64_t chosen, uint64_t masked, uint64_t masked_or_random, Tensor corrupted,
                                      Tensor labels, Stream stream) {
    cuda_corrupt(tokens_of(ids, special, mask_id, vocab_size), {chosen, masked, masked_or_random}, key.as<uint64_t>(),
                 corrupted.as<int64_t>(), labels.as<int64_t>(), stream.handle);
  }};
  return table;
}

}  // namespace sslops::random_token_corruption
