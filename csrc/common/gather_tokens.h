// Rows of [B, L, D] tensors, picked and put back by their indices.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace sslops::gather_tokens {

// Rows of D elements that lie together, at distances in bytes.
struct Rows {
  char* data;
  int64_t batch_stride, row_stride;
};

// ids [B, K] name rows of the N there are in each item of the batch. Others name none.
struct Ids {
  const int64_t* ids;
  int64_t batch, count, rows;
};

}  // namespace sslops::gather_tokens
