// What losses on columns need around the collectives of a process group, of each of V views [N, D]. moments [V, 2, D],
// float64: mean and biased variance of all ranks' rows.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::columns {

struct Table {
  // Of these rows alone
  void (*moments)(Tensors views, Tensor moments);
  // a [N, D] float32: z normalised by moments [2, D], or its own where there are none, as the operand dtype holds it;
  // eps < 0: centred only
  void (*normalize)(Tensor z, double eps, Tensor moments, DType operand, Tensor a);
  // means [V, 2, D], float64: mean(g), mean(a g) over these rows; g [N, D] each is the gradient of the unrounded a
  void (*gradient_means)(Tensors views, double eps, Tensor moments, Tensors g, Tensor means);
  // dz [N, D] = grad rstd (g - mean(g) - a mean(a g)), the means of all ranks. What is null is not wanted.
  void (*normalize_backward)(double grad, Tensors views, double eps, Tensor moments, Tensors g, Tensor means,
                             Tensors dz);

  static constexpr auto bound() {
    return std::tuple{Bound{"columns_moments", &Table::moments}, Bound{"columns_normalize", &Table::normalize},
                      Bound{"columns_gradient_means", &Table::gradient_means},
                      Bound{"columns_normalize_backward", &Table::normalize_backward}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::columns
