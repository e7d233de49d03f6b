// Sinkhorn's normalisation (arXiv 2006.09882, Section 3) in potentials: nothing of the size of the scores is written.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::sinkhorn {

struct Table {
  // Of each column of scores [V, B, K]: top [V, K], a maximum, and sums [V, K] of exp((score - top) / temperature).
  // Or of features [V, B, D], whose scores are those times prototypes [K, D] in products of dtype `operand`; unit:
  // times the rows of those over their lengths.
  void (*columns)(Tensor scores, Tensor prototypes, bool unit, DType operand, double temperature, Tensor top,
                  Tensor sums);
  // mass [V, K]: column sums of each row's softmax of scores / temperature + b, b [V, K].
  void (*mass)(Tensor scores, Tensor prototypes, bool unit, DType operand, double temperature, Tensor b, Tensor mass);

  // b [V, K] after so many iterations, its mean 0, where these are all rows: what sslops/ops/sinkhorn.py makes of
  // columns and mass, without a dozen small ops in each. balanced: the first one is columns.
  void (*potentials)(Tensor scores, Tensor prototypes, bool unit, DType operand, double temperature, int64_t iterations,
                     bool balanced, Tensor b);

  static constexpr auto bound() {
    return std::tuple{Bound{"sinkhorn_columns", &Table::columns}, Bound{"sinkhorn_mass", &Table::mass},
                      Bound{"sinkhorn_potentials", &Table::potentials}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::sinkhorn
