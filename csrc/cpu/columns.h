// What losses on columns need around the collectives of a process group, and the way back through batch normalisation.
// moments [2, D], float64: mean and biased variance of all ranks' rows, or null for those of z itself. eps < 0: centred
// only.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::columns {

struct Table {
  // moments [2, D] of z [N, D]
  void (*moments)(Tensor z, Tensor moments);
  // a [N, D] float32: z normalised, as the operand dtype holds it
  void (*normalize)(Tensor z, double eps, Tensor moments, DType operand, Tensor a);
  // means [2, D], float64: mean(g), mean(a g) over these rows; g [N, D] is the gradient of the unrounded a
  void (*gradient_means)(Tensor z, double eps, Tensor moments, Tensor g, Tensor means);
  // dz [N, D] = grad rstd (g - mean(g) - a mean(a g)); means as gradient_means has them, or null for those of g itself
  void (*normalize_backward)(double grad, Tensor z, double eps, Tensor moments, Tensor g, Tensor means, Tensor dz);
  // sum of x y, in double
  double (*inner)(Tensor x, Tensor y);

  static constexpr auto bound() {
    return std::tuple{Bound{"columns_moments", &Table::moments}, Bound{"columns_normalize", &Table::normalize},
                      Bound{"columns_gradient_means", &Table::gradient_means},
                      Bound{"columns_normalize_backward", &Table::normalize_backward},
                      Bound{"columns_inner", &Table::inner}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::columns
