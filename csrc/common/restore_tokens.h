// Sequences put back together: prefix tokens, visible tokens in their places, mask tokens in the others.
#pragma once
#include <cstdint>

#include "host_device.h"
#include "tensor.h"

namespace sslops::restore_tokens {

struct Array {
  void* data;
  DType dtype;
};

// visible [B, P + K, D], ids [B, L] in [0, L), out [B, P + L, D]
struct Shape {
  int64_t batch, prefix, kept, length, d;
};

SSLOPS_HOST Array array(const Tensor& x) { return {x.data, x.dtype}; }

// Of ids [B, L] and out or its gradient [B, P + L, D].
SSLOPS_HOST Shape shape(const Tensor& ids, int64_t kept, const Tensor& out) {
  return {ids.sizes[0], out.sizes[1] - ids.sizes[1], kept, ids.sizes[1], out.sizes[2]};
}

}  // namespace sslops::restore_tokens
