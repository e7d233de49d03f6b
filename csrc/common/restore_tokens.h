// Sequences put back together: prefix tokens, visible tokens in their places, mask tokens in the others.
#pragma once
#include <cstdint>

#include "counts.h"
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
  const int64_t* counts;  // [B]: how many of an item's K are tokens; or null: all
};

SSLOPS_HOST Array array(const Tensor& x) { return {x.data, x.dtype}; }

// Of ids [B, L] and out or its gradient [B, P + L, D].
SSLOPS_HOST Shape shape(const Tensor& ids, const Tensor& counts, int64_t kept, const Tensor& out) {
  return {ids.sizes[0], out.sizes[1] - ids.sizes[1], kept, ids.sizes[1], out.sizes[2], counts.as<int64_t>()};
}

SSLOPS_HOST_DEVICE bool is_masked(const Shape& s, int64_t b, int64_t id) { return id >= count_of(s.counts, b, s.kept); }

}  // namespace sslops::restore_tokens
