// VICReg (arXiv 2105.04906, Eq. 1 to 6). Z: a view [N, D], centred; S = Z^T Z. Two exact routes a view:
// - gram (3 N^2 D FLOP, by symmetry): ||S||^2 = ||Z Z^T||^2, and Z S = (Z Z^T) Z. Scratch: N D, and a few strips of
//   N x 64 for each thread.
// - panels (3 N D^2, by symmetry): tiles of S without its diagonal, and at once what they add to Z S. Scratch: 2 N D.
// A view whose off-diagonal part a Gram matrix does not know well enough goes by panels after all.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::vicreg {

struct Table {
  // The loss of one or two views; moments [V, 3, D] of them: mean, biased variance and S_ii, or -1 of views by panels.
  // kept: by_gram Z Z^T [V, N, N], else Z S without S's diagonal [V, N, D], or null. sums [V + 1]: scratch.
  double (*forward)(Tensors views, bool by_gram, double invariance, double variance, double covariance, double eps,
                    DType operand, Tensor moments, Tensor kept, Tensor sums);
  // dz [B, D] each, null if not wanted, of the rows from `first` on if by_gram their rows [V, B, N] are kept, else of
  // all; n: how many there are with those of other ranks, of_all [V, 2, D]: mean and variance, in float64, where they
  // are not those of the views.
  void (*backward)(double grad, Tensors views, bool by_gram, double invariance, double variance, double covariance,
                   double eps, DType operand, int64_t n, int64_t first, Tensor of_all, Tensor moments, Tensor kept,
                   Tensors dz);

  // What forward is made of, around the collectives of a process group. Of the rows [first, first + B): their squared
  // distance in sums [V + 1], and before it the squares of grams [V, B, N], if there are any.
  void (*grams)(Tensors views, DType operand, int64_t first, Tensor moments, Tensor grams, Tensor sums);
  // Takes S's diagonals from the sums, or S_ii from the moments of views that go by panels: those without grams, too.
  void (*choose)(Tensor moments, Tensor sums);
  // Zeroes the diagonal of rows [P, D] of S, from `first`, and returns the sum of the squares that are left.
  double (*off_diagonal)(Tensor s, int64_t first);
  double (*loss)(double invariance, double variance, double covariance, double eps, int64_t n, Tensor moments,
                 Tensor sums);

  static constexpr auto bound() {
    return std::tuple{Bound{"vicreg_forward", &Table::forward},
                      Bound{"vicreg_backward", &Table::backward},
                      Bound{"vicreg_grams", &Table::grams},
                      Bound{"vicreg_choose", &Table::choose},
                      Bound{"vicreg_off_diagonal", &Table::off_diagonal},
                      Bound{"vicreg_loss", &Table::loss}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::vicreg
