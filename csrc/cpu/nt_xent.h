// NT-Xent around its tile matmuls (arXiv 2002.05709, Eq. 1): what happens to S = z z^T besides the matmul.
// M = 2N rows; the positive of row i is i + N mod M. Logits are S / tau.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace sslops::nt_xent {

constexpr int64_t kMaxTile = 512;  // rows and columns of a tile, at most

// A tile of S: rows i0.., columns j0.., row stride ld. If mirrored (then j0 > i0), it also stands for its transpose.
struct Tile {
  float* s;
  int64_t ld, rows, cols, i0, j0, n;
  bool mirrored = false;
};

// The examples that results are wanted for: `count` pairs from `first`, 2 count rows of the 2N.
struct Own {
  int64_t n, first, count;
  int64_t row(int64_t k) const { return k < count ? first + k : n + first + k - count; }
};

struct Table {
  // z [2N, D] (float32 values as the operand dtype holds them) and inv_norm [2N] from z0, z1 [N, D].
  void (*normalize)(const void* z0, const void* z1, DType dtype, int64_t n, int64_t d, bool normalize, DType operand,
                    float* z, float* inv_norm);
  // Adds the tile to r[i], the sum over negatives of exp((s_ij - m[i]) / tau), and stores s_pos [N] as it passes.
  // fixed: the maximum is 1, and m is not read; otherwise m is the running maximum (start: lowest float).
  void (*forward_tile)(Tile tile, double tau, bool fixed, float* m, float* r, float* s_pos);
  // Once forward_tile has masked it: adds to above[i] how many of the tile's negatives have s_ij > bar[i]; both [2N].
  void (*count_tile)(Tile tile, const float* bar, float* above);
  // losses [2 count]; stats [3, 2 count] = (maximum of s, 1 / r with the positive in r, share of the negatives in r).
  void (*finish_forward)(Own own, double tau, bool fixed, const float* m, const float* r, const float* s_pos,
                         float* losses, float* stats);
  // S becomes W: W_ij = p_ij grad_i + p_ji grad_j, zero at positives and on the diagonal; a = grad / r, m from stats.
  void (*backward_tile)(Tile tile, double tau, bool fixed, const float* m, const float* a);
  // dz = W z [2N, D], row stride ld (used up), becomes dz0, dz1 [count, D]: positives, 1 / tau, normalisation;
  // dots [2 count] = <z, dz>.
  void (*finish_backward)(const void* z0, const void* z1, DType dtype, Own own, int64_t d, bool normalize, double tau,
                          const float* grad, const float* z, const float* inv_norm, const float* stats, float* dz,
                          int64_t ld, void* dz0, void* dz1, float* dots);
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::nt_xent
