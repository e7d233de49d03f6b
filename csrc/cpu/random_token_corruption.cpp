#include "random_token_corruption.h"

#include "../common/parallel.h"
#include "random.h"

namespace sslops::random_token_corruption {
namespace {

constexpr int64_t kThreadTokens = 4096;

void corrupt_all(const Tokens& tokens, const Odds& odds, const uint64_t* key, int64_t* corrupted, int64_t* labels) {
  parallel_for(tokens.count, kThreadTokens, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kBlocks) {
      uint32_t words[4 * kBlocks];
      draw_blocks(*key, first, RandomStream::random_token_corruption, words);
      for (int k = 0; k < kBlocks && first + k < end; ++k) {
        const uint32_t* const w = words + 4 * k;
        corrupt(tokens, odds, {{w[0], w[1], w[2], w[3]}}, first + k, corrupted, labels);
      }
    }
  });
}

void call(Tensor ids, Tensor special, Tensor key, int64_t mask_id, int64_t vocab_size, uint64_t chosen, uint64_t masked,
          uint64_t masked_or_random, Tensor corrupted, Tensor labels) {
  corrupt_all(tokens_of(ids, special, mask_id, vocab_size), {chosen, masked, masked_or_random}, key.as<uint64_t>(),
              corrupted.as<int64_t>(), labels.as<int64_t>());
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{corrupt_all, call};
}

}  // namespace sslops::random_token_corruption
