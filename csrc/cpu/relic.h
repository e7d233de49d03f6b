// RELIC around its tile matmuls (arXiv 2010.07922, 2201.05119): what happens to a = S / tau and b = S^T / tau,
// S = online target^T, besides the matmul. Row i's positive is i, its negatives are the `negatives` rows that follow it
// in cyclic order; p_i and q_i are the softmax of a_i. and b_i. over them all.
#pragma once
#include <cstdint>

#include "../common/isa.h"

namespace sslops::relic {

constexpr int64_t kMaxTile = 512;  // rows and columns of a tile, at most

// Rows i0.., columns j0.. of S and of S^T, row stride ld. If mirrored, all their pairs are negatives, and they also
// stand for their transposes: rows j0.. of S are the columns of S^T.
struct Tile {
  float *a, *b;
  int64_t ld, rows, cols, i0, j0;
  bool mirrored;
};

struct Batch {
  int64_t n, negatives;
  double tau;
  bool fixed;  // the maximum of S is taken to be 1
  float alpha, beta;
};

constexpr int kSums = 8, kStats = 8;

struct Table {
  // Adds the tile to sums [8, N], over the negatives of a row: the maxima of S and of S^T (start: lowest float; not
  // read if fixed), and relative to them sum exp(a), sum exp(b), sum exp(a) (b - positive) tau,
  // sum exp(a) (b - a), sum exp(a) (exp(b - a) - 1 - (b - a)) (if fixed), and how many a exceed the positive (if
  // count).
  void (*forward_tile)(Tile tile, Batch x, bool count, const float* s_pos, float* sums);
  // losses [N]; stats [8, N] = (maximum of S; 1 / sum exp(a), the positive in it; the same of S^T; alpha + beta Y with
  // Y = E_p[b - positive]; -dloss/d(positive logit); the positive's similarity; how many exceed it).
  void (*finish_forward)(Batch x, const float* s_pos, const float* sums, float* losses, float* stats);
  // S becomes dL/dS tau, and S^T the transpose of dL/dS tau at the transposed place; 0 where there is no negative.
  void (*backward_tile)(Tile tile, Batch x, const float* grad, const float* stats);
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::relic
