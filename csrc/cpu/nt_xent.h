// NT-Xent (arXiv 2002.05709, Eq. 1) over M = 2N rows z = [z0; z1]: the positive of row i is i + N mod M, logits are
// S / tau with S = z z^T. 4 M^2 D FLOP: by symmetry each tile of S serves its rows and its columns.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::nt_xent {

struct Table {
  // Of the examples first .. first + B, B as losses [2B] say: with r_i the sum over j != i of exp((s_ij - m_i) / tau),
  // m_i a maximum, stats [3, 2B] = m_i, 1 / r_i, the negatives' share of r_i; logged [2, 2B], unless it has no
  // elements, = the positive's s and how many negatives exceed it. inv_norm [2N].
  void (*forward)(Tensor z0, Tensor z1, double temperature, bool normalize, DType operand, int64_t first, Tensor losses,
                  Tensor logged, Tensor inv_norm, Tensor stats);
  // dz0, dz1 [B, D] of the examples from `first` on, and dots [2B] = <z_i, dL/dz_i>, from the gradients [2N] and stats
  // [3, 2N] of all: W_ij = p_ij grad_i + p_ji grad_j is symmetric, dz = (W z - what the positives pull) / tau.
  void (*backward)(Tensor grad, Tensor z0, Tensor z1, double temperature, bool normalize, DType operand, int64_t first,
                   Tensor inv_norm, Tensor stats, Tensor dz0, Tensor dz1, Tensor dots);

  static constexpr auto bound() {
    return std::tuple{Bound{"nt_xent_forward", &Table::forward}, Bound{"nt_xent_backward", &Table::backward}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::nt_xent
