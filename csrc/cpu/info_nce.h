// InfoNCE around its tile matmuls (arXiv 1807.03748, Eq. 4): what happens to S = Q C^T besides the matmul. Q [B, D]:
// the queries, unit rows where normalised; C [K, D]: the candidates as they are stored, their norms coming in here.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace sslops::info_nce {

// Rows [N, D] as they are stored, and the 1 / norm of each.
struct Rows {
  const void* x;
  DType dtype;
  int64_t n, d;
  const float* inv_norm;
};

// A tile of S: rows i0.., columns j0.., row stride ld; inv_norm of its columns.
struct Tile {
  float* s;
  int64_t ld, rows, cols, i0, j0;
  const float* inv_norm;
};

// Which pairs are no negatives: the positive, candidate first + i of row i (first < 0: it is none of the candidates),
// and those of equal ids (null: none).
struct Excluded {
  int64_t first;
  const int64_t *query_ids, *negative_ids;
};

// Where the weights of a tile go: exp(..) / norm, for their product with C. In bf16 they are padded with zeros.
struct Weights {
  void* w;  // null: nowhere
  DType dtype;
  int64_t ld;
};

// Running over the tiles, one of each per row of Q. o [B, D], row stride ld, shrinks when a maximum is raised.
struct State {
  float *max, *sum, *above;
  const float* positive;
  float* o;
  int64_t d, ld;
};

struct Table {
  // positive [B] = <q_i, k_i>
  void (*positives)(Rows query, const void* key, const float* key_inv_norm, float* positive);
  // Adds exp((s_ij - max[i]) / tau) over the tile's negatives to sum, and to above those that exceed the positive.
  // fixed: the maxima stay as they are; otherwise they are raised (start: lowest float).
  void (*forward_tile)(Tile tile, Excluded excluded, Weights weights, State state, double tau, bool fixed);
  // losses [B], stats [3, B] = (maximum of s, 1 / r with the positive in r, share of the negatives in r). If dquery is
  // not null: dquery [B, D] and dtemperature [B], derivatives of each row's loss, from o = weights C.
  void (*finish_forward)(Rows query, const void* key, const float* key_inv_norm, bool normalize, double tau,
                         State state, float* losses, float* stats, float* dquery, float* dtemperature);
  // S becomes W_ij = exp((s_ij - max[i]) / tau) a[i], zero where excluded.
  void (*backward_tile)(Tile tile, Excluded excluded, double tau, const float* max, const float* a);
  // Gradients of candidates j0.. from dc = W^T Q (row stride ld, used up), with the pull of those that are positives:
  // candidate first + i, by pull[i] q_i.
  void (*finish_candidates)(Rows candidates, int64_t j0, int64_t rows, bool normalize, float* dc, int64_t ld,
                            Rows query, const float* pull, int64_t first, double tau, void* out);
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::info_nce
