// CLIP (arXiv 2103.00020) of N images and their texts: the mean of two cross entropies, of the rows and of the columns
// of logit_scale S, S = image text^T. 8 N^2 D FLOP: a tile of S serves its rows and its columns; 6 of a batch that is
// so small that forward can hold S. Of a part, image [B, D] is first .. first + B of the N.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::clip {

struct Table {
  // Without a group. losses [N], and with a dlogit_scale the gradients of factor times their sum, dimage and dtext [N,
  // D], or one of them empty, and dlogit_scale [].
  void (*with_gradients)(Tensor image, Tensor text, double logit_scale, bool normalize, DType operand, double factor,
                         Tensor losses, Tensor dimage, Tensor dtext, Tensor dlogit_scale);
  // rows [3, B] = a maximum m_i of row i's s and the sum of exp(logit_scale (s_ij - m_i)), over j != i; s_ii. columns
  // [2, N]: the same two of the columns, over the B rows.
  void (*sums)(Tensor image, Tensor text, double logit_scale, bool normalize, DType operand, int64_t first, Tensor rows,
               Tensor columns);
  // losses [N], and stats [5, N] = (m_i; 1 / sum exp(logit_scale (s_ij - m_i)) over all j; the same of the columns;
  // (1 - p_ii) of the row and of the column, added), from rows [3, N] and columns [W, 2, N], those of W parts.
  void (*close)(Tensor rows, Tensor columns, double logit_scale, bool normalize, Tensor losses, Tensor stats);
  // dimage [B, D], dtext [N, D], or one of them empty, and dlogit_scale [], from grad [N] and stats [5, N]:
  // dL/ds_ij = logit_scale / 2 (p_ij grad_i + q_ij grad_j) off the diagonal, p of the rows and q of the columns.
  void (*backward)(Tensor grad, Tensor image, Tensor text, double logit_scale, bool normalize, DType operand,
                   int64_t first, Tensor stats, Tensor dimage, Tensor dtext, Tensor dlogit_scale);

  static constexpr auto bound() {
    return std::tuple{Bound{"clip_with_gradients", &Table::with_gradients}, Bound{"clip_sums", &Table::sums},
                      Bound{"clip_close", &Table::close}, Bound{"clip_backward", &Table::backward}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::clip
