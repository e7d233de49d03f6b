// VICReg around its matmuls (arXiv 2105.04906, Eq. 1 to 6).
#pragma once
#include <cstdint>

#include "columns.h"

namespace sslops::vicreg {

struct Table {
  // Zeroes the diagonal of the rows from panel.first of s [P, D] and returns the sum of the squares that are left.
  double (*off_diagonal)(float* s, columns::Panel panel);
  // sum of (x - y)^2 over [N, D]
  double (*squared_distance)(const void* x, const void* y, DType dtype, int64_t n, int64_t d);
  // dx[:, panel] = grad (weight (t - a diagonal) + (x - mean) spread + pull (x - other)); t has row stride ld; a with
  // diagonal, and other, may be null.
  void (*finish)(const float* t, int64_t ld, double weight, const float* a, const float* diagonal, const void* x,
                 const float* mean, const float* spread, const void* other, double pull, double grad,
                 columns::Panel panel, DType dtype, void* dx);
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::vicreg
