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

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{corrupt_all};
}

}  // namespace sslops::random_token_corruption
