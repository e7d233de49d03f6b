// Barlow Twins (arXiv 2103.03230, Eq. 1) of views [N, D] that are normalised to A and B: C = A^T B / N. Two exact
// routes:
// - gram (6 N^2 D FLOP, by symmetry): sum C^2 = <A A^T, B B^T> / N^2, dA = (2 lambd / N^2) (B B^T) A + B * slope.
//   Scratch: 2 N D, and a few strips of N x 64 for each thread.
// - panels (6 N D^2): tiles of C, their loss and dL/dC, and at once what they add to dA and dB. Scratch: 4 N D.
// A loss that the Gram matrices do not know well enough goes by panels after all.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::barlow_twins {

struct Table {
  // The loss; c [D], the diagonal of C, of whose numbers the first is 2, which no correlation is, if `by_gram` it went
  // by panels after all. kept: by_gram A A^T and B B^T [2, N, N], else dL/dA and dL/dB [2, N, D], or null. sums [3]:
  // scratch.
  double (*forward)(Tensor z_a, Tensor z_b, bool by_gram, double lambd, double eps, DType operand, Tensor c,
                    Tensor kept, Tensor sums);
  // dz [B, D] each, of the rows from `first` on if c and the rows [first, first + B) of the Gram matrices are kept,
  // else of all; with g [2, B, D], from those of the Gram matrices, dL/dA and dL/dB instead. `batches` runs of rows are
  // normalised each by itself. What is null is not wanted.
  void (*backward)(double grad, Tensor z_a, Tensor z_b, bool by_gram, double lambd, double eps, DType operand,
                   int64_t batches, int64_t first, Tensor c, Tensor kept, Tensor g, Tensors dz);

  // What forward is made of, around the collectives of a process group. Of the rows [first, first + B) of the Gram
  // matrices [2, B, N] and of c: sums [3] = the matrices' inner product over N^2, and those of c^2 and of (1 - c)^2.
  void (*grams)(Tensor z_a, Tensor z_b, double eps, DType operand, int64_t batches, int64_t first, Tensor c,
                Tensor grams, Tensor sums);
  // The loss from the sums, unless c says that it goes by panels
  double (*by_grams)(double lambd, Tensor c, Tensor sums);
  // Rows of C: s [P, D] = N C, from `first`, becomes dL/dC / N; returns their share of the loss.
  double (*weigh)(Tensor s, int64_t n, int64_t first, double lambd);

  static constexpr auto bound() {
    return std::tuple{Bound{"barlow_twins_forward", &Table::forward}, Bound{"barlow_twins_backward", &Table::backward},
                      Bound{"barlow_twins_grams", &Table::grams}, Bound{"barlow_twins_by_grams", &Table::by_grams},
                      Bound{"barlow_twins_weigh", &Table::weigh}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::barlow_twins
