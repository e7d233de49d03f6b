// Barlow Twins (arXiv 2103.03230, Eq. 1) of views [N, D] that are normalised to A and B: C = A^T B / N. Two exact
// routes:
// - gram (6 N^2 D FLOP, by symmetry): sum C^2 = <A A^T, B B^T> / N^2, dA = (2 lambd / N^2) (B B^T) A + B * slope.
//   Scratch: 2 N D, and a few strips of N x 64 for each thread.
// - panels (6 N D^2): tiles of C, their loss and dL/dC, and at once what they add to dA and dB. Scratch: 4 N D.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::barlow_twins {

struct Table {
  // Of the rows [first, first + B) of grams [2, B, N] = A A^T, B B^T; sums [3] = their inner product over N^2, and over
  // the diagonal c [D] of C those of c^2 and of (1 - c)^2. `batches` runs of rows are normalised each by itself.
  void (*forward_gram)(Tensor z_a, Tensor z_b, double eps, DType operand, int64_t batches, int64_t first, Tensor c,
                       Tensor grams, Tensor sums);
  // Of those rows dz_a, dz_b [B, D]; or with g [2, B, D] those of dL/dA and dL/dB instead. What is null is not wanted.
  void (*backward_gram)(double grad, Tensor z_a, Tensor z_b, double lambd, double eps, DType operand, int64_t batches,
                        int64_t first, Tensor c, Tensor grams, Tensor g, Tensor dz_a, Tensor dz_b);
  // The loss; c [D], the diagonal of C; dL/dA, dL/dB in g [2, N, D] if there is one
  double (*forward_panels)(Tensor z_a, Tensor z_b, double lambd, double eps, DType operand, Tensor c, Tensor g);
  // The same of rows of C alone: s [P, D] = N C, from `first`, becomes dL/dC / N; returns their share of the loss.
  double (*weigh)(Tensor s, int64_t n, int64_t first, double lambd);

  static constexpr auto bound() {
    return std::tuple{Bound{"barlow_twins_forward_gram", &Table::forward_gram},
                      Bound{"barlow_twins_backward_gram", &Table::backward_gram},
                      Bound{"barlow_twins_forward_panels", &Table::forward_panels},
                      Bound{"barlow_twins_weigh", &Table::weigh}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::barlow_twins
