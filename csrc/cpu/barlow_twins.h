// Barlow Twins around its matmuls (arXiv 2103.03230): batch normalisation of the views, the loss of a panel of the
// cross-correlation C = A^T B / N, and the way back through the normalisation.
// A panel is P columns of a [N, D] matrix, from column `first`; panels of float32 are contiguous [N, P].
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace sslops::barlow_twins {

struct Columns {
  int64_t n, d, first, p;
};

struct Table {
  // a [N, P] = (x - mean) rstd, rounded to the operand's dtype; rstd [P] = 1 / sqrt(var + eps), var biased.
  void (*normalize)(const void* x, DType dtype, Columns columns, double eps, DType operand, float* a, float* rstd);
  // c [P] = sum over rows of a b / N
  void (*diagonal)(const float* a, const float* b, int64_t n, int64_t p, float* c);
  // sum of x y, in double
  double (*inner)(const float* x, const float* y, int64_t size);
  // s [P, D] = N C, rows from `first`, becomes dL / dC / N; returns the panel's share of the loss.
  double (*panel)(float* s, Columns columns, double lambd);
  // dx[:, panel] = rstd (g - mean(g) - a mean(a g)) grad, with g = weight t + b slope; b, slope may be null. t has row
  // stride ld.
  void (*finish)(const float* t, int64_t ld, double weight, const float* b, const float* slope, const float* a,
                 const float* rstd, double grad, Columns columns, DType dtype, void* dx);
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::barlow_twins
