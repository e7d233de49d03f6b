// Rows picked by index on a CUDA device, and the gradient's way back: a warp for each row.
#pragma once
#include "../common/bound.h"
#include "../common/gather_tokens.h"

namespace sslops::gather_tokens {

// out[b, k] = tokens[b, ids[b, k]], `row` bytes each; all ones, which are NaN, where that is no row; zeros behind
// counts.
void cuda_forward(Rows tokens, Ids ids, int64_t row, char* out, void* stream);

// out[b, ids[b, k]] = grad[b, k]: the ids are unique, and out holds zeros. One that names no row is passed over.
void cuda_scatter(const char* grad, Ids ids, int64_t row, Rows out, void* stream);

// out[b, n] = the sum of grad[b, k] over the k with ids[b, k] = n, in their order, rounded once
void cuda_backward(Rows grad, DType grad_dtype, Ids ids, int64_t d, Rows out, DType out_dtype, void* stream);

// What Python calls, on the stream it gives.
struct CudaTable {
  void (*forward)(Tensor tokens, Tensor ids, Tensor counts, Tensor out, Stream stream);
  void (*scatter)(Tensor grad, Tensor ids, Tensor counts, Tensor d_tokens, Stream stream);
  void (*backward)(Tensor grad, Tensor ids, Tensor counts, Tensor d_tokens, Stream stream);

  static constexpr auto bound() {
    return std::tuple{Bound{"cuda_gather_tokens", &CudaTable::forward},
                      Bound{"cuda_gather_tokens_scatter", &CudaTable::scatter},
                      Bound{"cuda_gather_tokens_backward", &CudaTable::backward}};
  }
};
const CudaTable& cuda_table();

}  // namespace sslops::gather_tokens
