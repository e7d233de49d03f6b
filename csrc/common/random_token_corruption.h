// BERT's masking: some tokens are chosen; most of them become the mask token, some a random one, the others stay.
#pragma once
#include <cstdint>

#include "host_device.h"
#include "philox.h"
#include "tensor.h"

namespace sslops::random_token_corruption {

constexpr int64_t kNotChosen = -100;  // the label that torch's cross_entropy leaves out

// Probabilities in units of 2^-32: a random word below one of them is a hit.
struct Odds {
  uint64_t chosen, masked, masked_or_random;
};

struct Tokens {
  const int64_t* ids;   // [N]
  const bool* special;  // [N]: never chosen; or null
  int64_t count, mask_id, vocab_size;
};

SSLOPS_HOST Tokens tokens_of(const Tensor& ids, const Tensor& special, int64_t mask_id, int64_t vocab_size) {
  return {ids.as<int64_t>(), special.as<bool>(), ids.numel, mask_id, vocab_size};
}

// A Philox block for each token: the first word chooses it, the second what becomes of it, the third the random id.
SSLOPS_HOST_DEVICE Random4 draw(uint64_t key, int64_t k) {
  return philox(key, static_cast<uint64_t>(k), RandomStream::random_token_corruption);
}

SSLOPS_HOST_DEVICE void corrupt(const Tokens& x, const Odds& odds, const Random4& r, int64_t k, int64_t* corrupted,
                                int64_t* labels) {
  const int64_t id = x.ids[k];
  const bool chosen = r.word[0] < odds.chosen && !(x.special && x.special[k]);
  const int64_t random_id = static_cast<int64_t>(r.word[2] * static_cast<uint64_t>(x.vocab_size) >> 32);
  const int64_t replaced = r.word[1] < odds.masked ? x.mask_id : r.word[1] < odds.masked_or_random ? random_id : id;
  corrupted[k] = chosen ? replaced : id;
  labels[k] = chosen ? id : kNotChosen;
}

}  // namespace sslops::random_token_corruption
