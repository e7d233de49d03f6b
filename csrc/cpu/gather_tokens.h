// Rows picked by index, and the gradient's way back.
#pragma once
#include "../common/gather_tokens.h"
#include "../common/isa.h"

namespace sslops::gather_tokens {

struct Table {
  // out[b, k] = tokens[b, ids[b, k]], `row` bytes each, zeros where none is named; the ids have been checked
  void (*forward)(Rows tokens, Ids ids, int64_t row, char* out);
  // out[b, n] = the sum of grad[b, k] over the k with ids[b, k] = n, in their order, rounded once
  void (*backward)(Rows grad, DType grad_dtype, Ids ids, int64_t d, Rows out, DType out_dtype);

  // The same from Python: tokens [B, L, D], ids [B, K], counts [B] or None, out [B, K, D].
  void (*call_forward)(Tensor tokens, Tensor ids, Tensor counts, Tensor out);
  void (*call_backward)(Tensor grad, Tensor ids, Tensor counts, Tensor d_tokens);

  static constexpr auto bound() {
    return std::tuple{Bound{"gather_tokens", &Table::call_forward},
                      Bound{"gather_tokens_backward", &Table::call_backward}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::gather_tokens
