// Sequences put back together: prefix tokens, visible tokens in their places, mask tokens in the others.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace sslops::restore_tokens {

struct Array {
  void* data;
  DType dtype;
};

// visible [B, P + K, D], ids [B, L] in [0, L), out [B, P + L, D]
struct Shape {
  int64_t batch, prefix, kept, length, d;
};

}  // namespace sslops::restore_tokens
