// C = A^T B / N (arXiv 2103.03230, Eq. 2), A and B the normalised views [N, D]. Scratch: 2 N D, and for each thread
// a panel of C, of dL/dC or of the views, 128 wide.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::cross_correlation {

struct Table {
  // c [D, D] = A^T B / n; moments [2, 2, D], float64: of both views over all ranks' rows, or null for their own
  void (*forward)(Tensor z_a, Tensor z_b, double eps, Tensor moments, DType operand, int64_t n, Tensor c);
  // From dc [D, D] = dL/dC to out [N, D] each: dz_a and dz_b; with moments B dC^T and A dC, for what is left is over
  // all ranks' rows. What is null is not wanted.
  void (*backward)(Tensor z_a, Tensor z_b, double eps, Tensor moments, DType operand, Tensor dc, Tensors out);

  static constexpr auto bound() {
    return std::tuple{Bound{"cross_correlation_forward", &Table::forward},
                      Bound{"cross_correlation_backward", &Table::backward}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::cross_correlation
