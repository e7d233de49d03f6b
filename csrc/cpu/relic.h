// RELIC (arXiv 2010.07922, 2201.05119) of N rows, S = online target^T: row i's positive is i, its negatives are the
// `negatives` rows that follow it in cyclic order; p_i and q_i are the softmax over them all of row i of S / tau and of
// S^T / tau. A tile of S and the tile of S^T at the same place hold all that their rows and their columns need.
// 2 N^2 D FLOP for S, and as many for each product that a gradient takes of it; few negatives: the tiles of their band.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::relic {

struct Table {
  // losses [N] and stats [8, N] = (a maximum of row i of S over its candidates; 1 / sum exp((s - maximum) / tau) over
  // them; the same of S^T; Y_i = E_p[s_ji - s_ii]; -tau dloss/ds_ii; s_ii; how many negatives exceed it, if `count`).
  // With a dtemperature also the gradients of factor times the losses' sum, from tiles of S that stay, as many as may.
  void (*forward)(Tensor online, Tensor target, double temperature, double alpha, double beta, int64_t negatives,
                  bool normalize, DType operand, bool count, Tensor losses, Tensor stats, double factor, Tensor donline,
                  Tensor dtarget, Tensor dtemperature);
  // donline, dtarget [N, D] (or None), dtemperature [] from grad [N]. With W_ij = tau dL/ds_ij = p_ij grad_i (alpha +
  // beta (Y_i - (s_ji - s_ii)) / tau) where j is a negative of i, + beta grad_j (q_ji - p_ji) where i is one of j.
  void (*backward)(Tensor grad, Tensor online, Tensor target, double temperature, double alpha, double beta,
                   int64_t negatives, bool normalize, DType operand, Tensor stats, Tensor donline, Tensor dtarget,
                   Tensor dtemperature);

  static constexpr auto bound() {
    return std::tuple{Bound{"relic_forward", &Table::forward}, Bound{"relic_backward", &Table::backward}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::relic
