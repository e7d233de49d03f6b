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

}  // namespace sslops::random_token_corruption
