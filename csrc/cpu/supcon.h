// SupCon (arXiv 2004.11362) over the M = V N rows of V views: the positives of a row are all others of its class,
// logits are S / tau with S = z z^T. 4 M^2 D FLOP: by symmetry each tile of S serves its rows and its columns; 3
// of a batch that is so small that forward can hold the tiles.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::supcon {

struct Table {
  // z [M, D] or [V, N, D]; classes int32 [M] or [N], of 0 .. 2 N - 1; beside them, or none: ids int32, at least 0, rows
  // of one id being no candidates of each other, and weights float32 of the rows' losses; inside: L_in, else L_out.
  // Of the examples first .. first + B, B as losses [V B] say; positives [V B], how many a row has; stats [4, V B]: m_i
  // and weight / r_i, r_i the sum of exp((s_ij - m_i) / tau) over j != i, 0 if it has no positive; inside the same of
  // the positives alone, else 0 and weight over their number. inv_norm [V N]. With a dtemperature, of all examples: the
  // gradients of factor times the losses' sum.
  void (*forward)(Tensor z, Tensor classes, Tensor ids, Tensor weights, double temperature, bool normalize, bool inside,
                  DType operand, int64_t first, Tensor losses, Tensor positives, Tensor inv_norm, Tensor stats,
                  double factor, Tensor dz, Tensor dtemperature);
  // dz [B, D] or [V, B, D] of the examples from `first` on, and what they add to dtemperature, from the gradients [V N]
  // and stats [4, V N] of all: W_ij = (p_ij - q_ij) grad_i + (p_ji - q_ji) grad_j is symmetric, q_ij what L_in or L_out
  // wants p_ij to be, dz = W z / tau. The difference is taken in the tile: it may be small, and W may be rounded.
  void (*backward)(Tensor grad, Tensor z, Tensor classes, Tensor ids, double temperature, bool normalize, bool inside,
                   DType operand, int64_t first, Tensor inv_norm, Tensor stats, Tensor dz, Tensor dtemperature);
  // The same of candidates that are not z's rows but keys [K, D], of a dtype of their own: classes of all are of 0 ..
  // 2 (N + K) - 1; ids and key_ids: both or neither. dz [V N, D] and dtemperature [V N], float32, unless they have no
  // elements: of each row's weighted loss, from a second pass, 6 M K D FLOP in all. Scratch: z twice, at most
  // 15 (M + K) numbers, and D + 5 floats for M + 16384 rows at most.
  void (*among_keys)(Tensor z, Tensor classes, Tensor ids, Tensor weights, Tensor keys, Tensor key_classes,
                     Tensor key_ids, double temperature, bool normalize, bool inside, DType operand, Tensor inv_norm,
                     Tensor losses, Tensor positives, Tensor dz, Tensor dtemperature);

  static constexpr auto bound() {
    return std::tuple{Bound{"supcon_forward", &Table::forward}, Bound{"supcon_backward", &Table::backward},
                      Bound{"supcon_among_keys", &Table::among_keys}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::supcon
