// NT-Xent (arXiv 2002.05709, Eq. 1) over the M = V N rows of V views: the positives of row i are i + k N mod M, k = 1
// .. V - 1, logits are S / tau with S = z z^T. 4 M^2 D FLOP: by symmetry each tile of S serves its rows and its
// columns; 3 of a batch that is so small that forward can hold the tiles.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::nt_xent {

struct Table {
  // Views: z0 and z1 [N, D], or z0 [V, N, D] and no z1. classes: int32 [N], at least 0, or none; examples of one class
  // are no negatives of each other.
  // Of the examples first .. first + B, B as losses [V B] say: with r_ip the sum of exp((s_ij - m_i) / tau) over the
  // negatives j of row i and its positive p, m_i any number that keeps them in range, stats [V + 1, V B] = m_i, the
  // mean of 1 / r_ip over p, and the negatives' share of r_ip over V - 1 for p = 1 ..; logged [2 (V - 1), V B], unless
  // it has no elements, = the positives' s and how many negatives exceed them. inv_norm [V N].
  // If decoupled, r_ip is without p, and the share is p's weight of positive_weights float32 [V N], 1 if there are
  // none. With a dtemperature, of all examples: the gradients of factor times the losses' sum.
  void (*forward)(Tensor z0, Tensor z1, Tensor classes, Tensor positive_weights, double temperature, bool normalize,
                  bool decoupled, DType operand, int64_t first, Tensor losses, Tensor logged, Tensor inv_norm,
                  Tensor stats, double factor, Tensor dz0, Tensor dz1, Tensor dtemperature);
  // dz0, dz1 [B, D], or dz0 [V, B, D], of the examples from `first` on, and what they add to dtemperature, from the
  // gradients [V N] and stats [V + 1, V N] of all: W_ij = p_ij grad_i + p_ji grad_j is symmetric, dz = (W z - what the
  // positives pull) / tau.
  void (*backward)(Tensor grad, Tensor z0, Tensor z1, Tensor classes, double temperature, bool normalize, DType operand,
                   int64_t first, Tensor inv_norm, Tensor stats, Tensor dz0, Tensor dz1, Tensor dtemperature);

  static constexpr auto bound() {
    return std::tuple{Bound{"nt_xent_forward", &Table::forward}, Bound{"nt_xent_backward", &Table::backward}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::nt_xent
