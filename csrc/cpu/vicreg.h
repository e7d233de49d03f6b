// VICReg (arXiv 2105.04906, Eq. 1 to 6). Z: a view [N, D], centred; S = Z^T Z. Two exact routes a view:
// - gram (3 N^2 D FLOP, by symmetry): ||S||^2 = ||Z Z^T||^2, and Z S = (Z Z^T) Z. Scratch: N D, and a few strips of
//   N x 64 for each thread.
// - panels (3 N D^2, by symmetry): tiles of S without its diagonal, and at once what they add to Z S. Scratch: 2 N D.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::vicreg {

struct Table {
  // moments [3, D] = mean, biased variance and S_ii; rows [first, first + B) of gram [B, N] = Z Z^T; returns the sum of
  // its squares.
  double (*forward_gram)(Tensor z, DType operand, int64_t first, Tensor moments, Tensor gram);
  // moments as above; t [N, D], if there is one, = Z S without S's diagonal; returns the sum of the squares off it.
  double (*forward_panels)(Tensor z, DType operand, Tensor moments, Tensor t);
  // Zeroes the diagonal of rows [P, D] of S, from `first`, and returns the sum of the squares that are left.
  double (*off_diagonal)(Tensor s, int64_t first);
  // sum of (x - y)^2
  double (*squared_distance)(Tensor x, Tensor y);
  // dz [B, D] of the rows from `first` on: grad (weight t + Z spread + pull (z - other)), t [B, D] given, or made of
  // gram and of moments' third row. of_all [2, D]: mean and variance, in float64, where they are not those of z; other
  // may be null.
  void (*backward)(double grad, Tensor z, Tensor other, DType operand, int64_t first, Tensor of_all, Tensor t,
                   Tensor gram, Tensor moments, double weight, Tensor spread, double pull, Tensor dz);

  static constexpr auto bound() {
    return std::tuple{
        Bound{"vicreg_forward_gram", &Table::forward_gram}, Bound{"vicreg_forward_panels", &Table::forward_panels},
        Bound{"vicreg_off_diagonal", &Table::off_diagonal}, Bound{"vicreg_squared_distance", &Table::squared_distance},
        Bound{"vicreg_backward", &Table::backward}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::vicreg
