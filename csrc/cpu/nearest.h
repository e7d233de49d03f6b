// Each query's nearest candidates by the inner product: a tile of S^T passes by, and what is kept of it is the running
// best of each query. 2 B K D FLOP.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::nearest {

struct Table {
  // query [B, D], support [K, D] of a dtype of its own, ids [B, k] int64: the k largest <q_i, s_j>, best first, ties to
  // the lowest j; NaN and -inf count as the lowest number. Not j = first + i, where i is left out, if first >= 0. k is
  // at most the number of candidates. Scratch: the queries twice, and 2 k floats for B + 65536 rows at most.
  void (*forward)(Tensor query, Tensor support, bool normalize, DType operand, int64_t first, Tensor ids);

  static constexpr auto bound() { return std::tuple{Bound{"nearest_forward", &Table::forward}}; }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::nearest
