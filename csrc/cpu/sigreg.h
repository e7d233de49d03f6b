// SIGReg (arXiv 2511.08544): how far embeddings z [V, N, D] are from a standard normal along directions [M, D], each
// view by itself. u = <row, direction>; knots t_k = k step for k = 1 .. K - 1, at t = 0 there is nothing to learn;
// phi_k = exp(-t_k^2 / 2), what a normal u has for the mean of exp(i t_k u).
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::sigreg {

struct Table {
  // Random unit vectors [M, D] under key [], int64.
  void (*draw)(Tensor key, Tensor directions);
  // sums [V, 2, K - 1, M] over the rows, of cos(t_k u) - phi_k and of sin(t_k u)
  void (*forward)(Tensor z, Tensor directions, double step, Tensor sums);
  // The integral over t from -t_max to t_max of phi times the sums' squares, summed over views and directions.
  double (*statistic)(Tensor sums, double step);
  // dz = scale / 2 times the gradient of the statistic
  void (*backward)(double scale, Tensor z, Tensor directions, double step, Tensor sums, Tensor dz);

  static constexpr auto bound() {
    return std::tuple{Bound{"sigreg_draw", &Table::draw}, Bound{"sigreg_forward", &Table::forward},
                      Bound{"sigreg_statistic", &Table::statistic}, Bound{"sigreg_backward", &Table::backward}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::sigreg
