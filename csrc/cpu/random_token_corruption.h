// BERT's masking in one pass.
#pragma once
#include "../common/isa.h"
#include "../common/random_token_corruption.h"

namespace sslops::random_token_corruption {

struct Table {
  void (*corrupt)(const Tokens& tokens, const Odds& odds, const uint64_t* key, int64_t* corrupted, int64_t* labels);
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::random_token_corruption
