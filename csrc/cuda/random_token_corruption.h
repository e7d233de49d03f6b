// BERT's masking on a CUDA device: one launch.
#pragma once
#include "../common/random_token_corruption.h"

namespace sslops::random_token_corruption {

// key: on the device.
void cuda_corrupt(const Tokens& tokens, const Odds& odds, const uint64_t* key, int64_t* corrupted, int64_t* labels,
                  void* stream);

}  // namespace sslops::random_token_corruption
