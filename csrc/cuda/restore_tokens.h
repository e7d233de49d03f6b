// Sequences put back together on a CUDA device, and what the mask token and the positions get of their gradient.
#pragma once
#include "../common/bound.h"
#include "../common/restore_tokens.h"

namespace sslops::restore_tokens {

// As csrc/cpu/restore_tokens.h has it. Ids that are not in [0, L) make rows of NaN.
void cuda_forward(Array visible, Array mask_token, Array positions, const int64_t* ids, Shape shape, Array out,
                  void* stream);

// parts [P + L, D]: for each position the sum of grad over the batch's rows that are mask tokens. positions [P + L, D],
// which may be null: the sums over all.
void cuda_reduce(Array grad, const int64_t* ids, Shape shape, double* parts, float* positions, void* stream);

// What Python calls, on the stream it gives.
struct CudaTable {
  void (*forward)(Tensor visible, Tensor mask_token, Tensor positions, Tensor ids, Tensor counts, int64_t kept,
                  Tensor out, Stream stream);
  void (*reduce)(Tensor grad, Tensor ids, Tensor counts, int64_t kept, Tensor parts, Tensor positions, Stream stream);

  static constexpr auto bound() {
    return std::tuple{Bound{"cuda_restore_tokens", &CudaTable::forward},
                      Bound{"cuda_restore_tokens_reduce", &CudaTable::reduce}};
  }
};
const CudaTable& cuda_table();

}  // namespace sslops::restore_tokens
