#include "launch.cuh"
#include "random_token_corruption.h"

namespace sslops::random_token_corruption {
namespace {

constexpr unsigned kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    corrupt_one(Tokens tokens, const uint64_t* key, int64_t* corrupted, int64_t* labels) {
  const int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (k >= tokens.count) return;
  const Random4 own = draw(*key, k);
  bool chosen = own.word[0] < tokens.odds.begun[0];
  uint32_t action = own.word[1];
  if (!alone(tokens)) {
    const int64_t row = k / tokens.row, unit = tokens.units ? tokens.units[k] : k - row * tokens.row;
    const int64_t block = first_block(tokens, row) + tokens.odds.spans - 1 + unit;
    chosen = false;
    for (int back = 0; back < tokens.odds.spans && !chosen; ++back) {
      const Random4 start = draw(*key, block - back);
      chosen = start.word[0] < tokens.odds.begun[back];
      if (chosen && tokens.odds.spans > 1) action = start.word[1];
    }
  }
  corrupt(tokens, k, chosen, action, own.word[2], corrupted, labels);
}

}  // namespace

void cuda_corrupt(const Tokens& tokens, const uint64_t* key, int64_t* corrupted, int64_t* labels, void* stream) {
  const int64_t blocks = (tokens.count + kThreads - 1) / kThreads;
  if (blocks > 0) launch(corrupt_one, blocks, kThreads, stream, tokens, key, corrupted, labels);
}

const CudaTable& cuda_table() {
  static constexpr CudaTable table{[](Tensor ids, Tensor special, Tensor units, Tensor key, Tensor runs, Tensor begun,
                                      int64_t row, int64_t drawn, int64_t mask_id, uint64_t masked,
                                      uint64_t masked_or_random, Tensor corrupted, Tensor labels, Stream stream) {
    cuda_corrupt(tokens_of(ids, special, units, runs, begun, row, drawn, mask_id, masked, masked_or_random),
                 key.as<uint64_t>(), corrupted.as<int64_t>(), labels.as<int64_t>(), stream.handle);
  }};
  return table;
}

}  // namespace sslops::random_token_corruption
