// C = A^T B / N (arXiv 2103.03230, Eq. 2), A and B the normalised views [N, D]. Scratch: 2 N D, and for each thread
// a panel of C, of dL/dC or of the views, 128 wide.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::cross_correlation {

struct Table {
  // c [D, D] = A^T B / n; moments [2, D], float64: of all ranks' rows, or null for those of the views themselves
  void (*forward)(Tensor z_a, Tensor z_b, double eps, Tensor moments_a, Tensor moments_b, DType operand, int64_t n,
                  Tensor c);
  // g [N, D] = B dC^T, or with transposed A dC for z = z_a
  void (*product)(Tensor z, double eps, Tensor moments, DType operand, Tensor dc, bool transposed, Tensor g);

  static constexpr auto bound() {
    return std::tuple{Bound{"cross_correlation_forward", &Table::forward},
                      Bound{"cross_correlation_product", &Table::product}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::cross_correlation
