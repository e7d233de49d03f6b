// InfoNCE (arXiv 1807.03748, Eq. 4): s_ij = <q_i, c_j>, the negatives of query i being all candidates but those of its
// own id, those that the mask leaves out and, in-batch, its positive. The candidates pass by in chunks; r_i and o_i,
// the sum of the negatives with the weights of r_i, come from one pass: 4 B K D FLOP. Their own gradient is a second
// one, as long. Paired negatives, M of each query's own, are read once in either direction.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::info_nce {

struct Table {
  // query [B, D], key [N, D], of which first + i is the positive of i; negatives [K, D] of a dtype of their own, or
  // None for in-batch: the keys. query_ids [B], negative_ids (the candidates') int64, both or neither; below 0: of
  // none. negative_mask [B, K], paired_mask [B, M]: bool of any strides, false for what is left out and not looked at;
  // paired [B, M, D] of a dtype of their own; positive_weights [B] float32, for decoupled; each of these may be None.
  // losses [B]; logged [2, B] = the positive's s, of unrounded rows, and how many negatives exceed it; stats [3, B] =
  // m_i, 1 / r_i, the negatives' share of r_i (decoupled: the positive's weight), with r_i the sum of
  // exp((s - m_i) / tau). dquery [B, D] and dtemperature [B], float32, unless they have no elements: of each row's
  // loss. Scratch: the queries again, and D + 3 floats for 2 B + 16384 rows at most; with a mask 64 KB a thread.
  void (*forward)(Tensor query, Tensor key, Tensor negatives, Tensor query_ids, Tensor negative_ids,
                  Tensor negative_mask, Tensor paired, Tensor paired_mask, Tensor positive_weights, double temperature,
                  bool normalize, DType operand, int64_t first, bool decoupled, Tensor losses, Tensor logged,
                  Tensor dquery, Tensor dtemperature, Tensor stats);
  // dkey, dnegatives, dpaired in their inputs' shapes and dtypes, unless they have no elements. grad [B].
  void (*backward)(Tensor grad, Tensor query, Tensor key, Tensor negatives, Tensor query_ids, Tensor negative_ids,
                   Tensor negative_mask, Tensor paired, Tensor paired_mask, double temperature, bool normalize,
                   DType operand, int64_t first, Tensor stats, Tensor dkey, Tensor dnegatives, Tensor dpaired);

  static constexpr auto bound() {
    return std::tuple{Bound{"info_nce_forward", &Table::forward}, Bound{"info_nce_backward", &Table::backward}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::info_nce
