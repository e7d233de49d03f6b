// BERT's masking in one pass.
#pragma once
#include "../common/isa.h"
#include "../common/random_token_corruption.h"

namespace sslops::random_token_corruption {

struct Table {
  void (*corrupt)(const Tokens& tokens, const uint64_t* key, int64_t* corrupted, int64_t* labels);

  // The same from Python: special and units in the shape of ids, or None; key []; the rest as tokens_of has it.
  void (*call)(Tensor ids, Tensor special, Tensor units, Tensor key, Tensor runs, Tensor begun, int64_t row,
               int64_t drawn, int64_t mask_id, uint64_t masked, uint64_t masked_or_random, Tensor corrupted,
               Tensor labels);

  static constexpr auto bound() { return std::tuple{Bound{"random_token_corruption", &Table::call}}; }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::random_token_corruption
