#include "random_token_corruption.h"

#include "../common/parallel.h"
#include "random.h"

namespace sslops::random_token_corruption {
namespace {

constexpr int64_t kThreadTokens = 4096;

void corrupt_all(const Tokens& tokens, const Odds& odds, const uint64_t* key, int64_t* corrupted, int64_t* labels) {
  parallel_for(tokens.count, kThreadTokens, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kBlocks) {
      uint32_t words[4][kBlocks];
      draw_blocks(words, [&](int k) { return draw(*key, first + k); });
      for (int k = 0; k < kBlocks && first + k < end; ++k)
        corrupt(tokens, odds, {{words[0][k], words[1][k], words[2][k], words[3][k]}}, first + k, corrupted, labels);
    }
  });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{corrupt_all};
}

}  // namespace sslops::random_token_corruption
