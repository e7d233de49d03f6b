// Rows of [B, L, D] tensors, picked and put back by their indices.
#pragma once
#include <cstdint>

#include "counts.h"
#include "host_device.h"
#include "tensor.h"

namespace sslops::gather_tokens {

// Rows of D elements that lie together, at distances in bytes.
struct Rows {
  char* data;
  int64_t batch_stride, row_stride;
};

// ids [B, K] name rows of the N there are in each item of the batch, the first counts[b] of an item's K, or all. Others
// name none.
struct Ids {
  const int64_t* ids;
  int64_t batch, count, rows;
  const int64_t* counts;  // or null
};

// Of x [B, N, D], whose last stride is 1.
SSLOPS_HOST Rows rows_of(const Tensor& x) { return {x.data, x.strides[0] * x.item_size, x.strides[1] * x.item_size}; }

// Of x [B, N, D].
SSLOPS_HOST Ids ids_of(const Tensor& ids, const Tensor& counts, const Tensor& x) {
  return {ids.as<int64_t>(), ids.sizes[0], ids.sizes[1], x.sizes[1], counts.as<int64_t>()};
}

}  // namespace sslops::gather_tokens
