// BERT's masking: some tokens are chosen; most of them become the mask token, some a random one, the others stay.
#pragma once
#include <cstdint>

#include "host_device.h"
#include "philox.h"
#include "tensor.h"

namespace sslops::random_token_corruption {

constexpr int64_t kNotChosen = -100;    // the label that torch's cross_entropy leaves out
constexpr int kSpans = 32, kRuns = 32;  // the longest span; runs of special ids

// Probabilities in units of 2^-32: a random word below one of them is a hit.
struct Odds {
  uint64_t masked, masked_or_random;
  int spans;
  uint64_t begun[kSpans];  // that a span begins at a unit, and is longer than k
};

// Ids that are neither chosen nor drawn: ascending runs [first, end).
struct Specials {
  int runs;
  int64_t drawn;  // how many ids of the vocabulary are left
  int64_t first[kRuns], end[kRuns];
};

struct Tokens {
  const int64_t* ids;    // [N]
  const bool* special;   // [N]: never chosen; or null
  const int64_t* units;  // [N]: which unit of its row a token is of, ascending by 0 or 1; or null: each is one
  int64_t count, row, mask_id;
  Odds odds;
  Specials specials;
};

// runs [R, 2], begun [S]: in the host's memory.
SSLOPS_HOST Tokens tokens_of(const Tensor& ids, const Tensor& special, const Tensor& units, const Tensor& runs,
                             const Tensor& begun, int64_t row, int64_t drawn, int64_t mask_id, uint64_t masked,
                             uint64_t masked_or_random) {
  Tokens x{ids.as<int64_t>(), special.as<bool>(), units.as<int64_t>(), ids.numel, row, mask_id, {}, {}};
  x.odds.masked = masked, x.odds.masked_or_random = masked_or_random;
  x.odds.spans = static_cast<int>(begun.numel), x.specials.runs = static_cast<int>(runs.numel / 2);
  for (int k = 0; k < x.odds.spans; ++k) x.odds.begun[k] = begun.as<uint64_t>()[k];
  for (int k = 0; k < x.specials.runs; ++k) {
    x.specials.first[k] = runs.as<int64_t>()[2 * k];
    x.specials.end[k] = runs.as<int64_t>()[2 * k + 1];
  }
  x.specials.drawn = drawn;
  return x;
}

// Whether a token's own block is all that is drawn for it.
SSLOPS_HOST_DEVICE bool alone(const Tokens& x) { return x.odds.spans == 1 && !x.units; }

// A Philox block for each unit of a row, and for those spans that begin before it: its first word says whether one
// begins there, its second what becomes of it. The block of the k-th unit is first_block(row) + spans - 1 + k.
SSLOPS_HOST_DEVICE int64_t first_block(const Tokens& x, int64_t row) { return row * (x.row + x.odds.spans - 1); }

// A Philox block for each token: its second word says what becomes of one without spans, its third is the random id.
SSLOPS_HOST_DEVICE Random4 draw(uint64_t key, int64_t block) {
  return philox(key, static_cast<uint64_t>(block), RandomStream::random_token_corruption);
}

SSLOPS_HOST_DEVICE bool is_special(const Tokens& x, int64_t k) {
  if (x.special && x.special[k]) return true;
  for (int run = 0; run < x.specials.runs; ++run)
    if (x.ids[k] >= x.specials.first[run] && x.ids[k] < x.specials.end[run]) return true;
  return false;
}

// chosen, action: by the unit's draws; random: the token's third word.
SSLOPS_HOST_DEVICE void corrupt(const Tokens& x, int64_t k, bool chosen, uint32_t action, uint32_t random,
                                int64_t* corrupted, int64_t* labels) {
  const int64_t id = x.ids[k];
  corrupted[k] = id;
  labels[k] = kNotChosen;
  if (!chosen || is_special(x, k)) return;
  labels[k] = id;
  if (action < x.odds.masked) {
    corrupted[k] = x.mask_id;
  } else if (action < x.odds.masked_or_random) {
    int64_t drawn = static_cast<int64_t>(random * static_cast<uint64_t>(x.specials.drawn) >> 32);
    for (int run = 0; run < x.specials.runs; ++run)
      if (drawn >= x.specials.first[run]) drawn += x.specials.end[run] - x.specials.first[run];
    corrupted[k] = drawn;
  }
}

}  // namespace sslops::random_token_corruption
