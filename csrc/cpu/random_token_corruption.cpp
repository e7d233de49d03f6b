#include "random_token_corruption.h"

#include "../common/parallel.h"
#include "random.h"

namespace sslops::random_token_corruption {
namespace {

constexpr int64_t kThreadTokens = 4096, kTile = 1024;

// Of the units of some tokens of a row: where spans begin, and what becomes of them.
struct Starts {
  int64_t first;  // the unit whose block the first word is of
  uint32_t begun[kTile + kSpans + kBlocks], action[kTile + kSpans + kBlocks];

  void draw(const Tokens& x, uint64_t key, int64_t row, int64_t from, int64_t to) {  // units, both included
    first = from - (x.odds.spans - 1);
    const int64_t block = first_block(x, row) + from, count = to - first + 1;
    for (int64_t done = 0; done < count; done += kBlocks) {
      uint32_t words[4 * kBlocks];
      draw_blocks(key, block + done, RandomStream::random_token_corruption, words);
      for (int k = 0; k < kBlocks; ++k) begun[done + k] = words[4 * k], action[done + k] = words[4 * k + 1];
    }
  }

  // How far before the unit the nearest span begins that it is in; spans if it is in none.
  int back(const Odds& odds, int64_t unit) const {
    const uint32_t* const at = begun + (unit - first);
    int k = 0;
    while (k < odds.spans && at[-k] >= odds.begun[k]) ++k;
    return k;
  }
};

// Tokens [first, last) of one row
void corrupt_some(const Tokens& x, uint64_t key, int64_t first, int64_t last, Starts& starts, int64_t* corrupted,
                  int64_t* labels) {
  const int64_t row = first / x.row;
  const auto unit = [&](int64_t k) { return x.units ? x.units[k] : k - row * x.row; };
  if (!alone(x)) starts.draw(x, key, row, unit(first), unit(last - 1));
  for (; first < last; first += kBlocks) {
    uint32_t words[4 * kBlocks];
    draw_blocks(key, first, RandomStream::random_token_corruption, words);
    for (int k = 0; k < kBlocks && first + k < last; ++k) {
      const uint32_t* const w = words + 4 * k;
      bool chosen = w[0] < x.odds.begun[0];
      uint32_t action = w[1];
      if (!alone(x)) {
        const int64_t at = unit(first + k);
        const int back = starts.back(x.odds, at);
        chosen = back < x.odds.spans;
        if (chosen && x.odds.spans > 1) action = starts.action[at - starts.first - back];
      }
      corrupt(x, first + k, chosen, action, w[2], corrupted, labels);
    }
  }
}

void corrupt_all(const Tokens& tokens, const uint64_t* key, int64_t* corrupted, int64_t* labels) {
  parallel_for(tokens.count, kThreadTokens, [&](int64_t begin, int64_t end) {
    Starts starts;
    while (begin < end) {
      const int64_t row_end = (begin / tokens.row + 1) * tokens.row, tile_end = begin + kTile;
      const int64_t last = end < row_end ? end : row_end;
      corrupt_some(tokens, *key, begin, last < tile_end ? last : tile_end, starts, corrupted, labels);
      begin = last < tile_end ? last : tile_end;
    }
  });
}

void call(Tensor ids, Tensor special, Tensor units, Tensor key, Tensor runs, Tensor begun, int64_t row, int64_t drawn,
          int64_t mask_id, uint64_t masked, uint64_t masked_or_random, Tensor corrupted, Tensor labels) {
  corrupt_all(tokens_of(ids, special, units, runs, begun, row, drawn, mask_id, masked, masked_or_random),
              key.as<uint64_t>(), corrupted.as<int64_t>(), labels.as<int64_t>());
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{corrupt_all, call};
}

}  // namespace sslops::random_token_corruption
