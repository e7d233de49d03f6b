// bf16 matmuls that keep their float32 result, on AMX tiles (torch.mm rounds it to bf16).
// Matrices are padded with zeros to multiples of kBlock in every dimension.
#pragma once
#include <cstdint>

#include "../common/isa.h"

namespace sslops::bf16_gemm {

constexpr int64_t kBlock = 32;

// A right operand B [k, n] in 16 x 16 tiles of (two k) x (one n), 512 values each.
struct Packed {
  const uint16_t* tiles;
  int64_t n_step, k_step;  // values from one tile to the next along n and k
};

// Pointers are null where the instruction set has no bf16 tiles.
struct Table {
  // Row-major x [rows, cols] as B = x (k = rows) and as B = x^T (k = cols). Tiles of 32 rows of x follow each other.
  void (*pack)(const uint16_t* x, int64_t rows, int64_t cols, uint16_t* as_is, uint16_t* transposed);
  // c [m, n] (+)= a [m, k] b [k, n]
  void (*matmul)(const uint16_t* a, int64_t lda, Packed b, int64_t m, int64_t n, int64_t k, float* c, int64_t ldc,
                 bool accumulate);
  // x [rows, cols] float32 rounded to bf16, as it is (or null) and transposed, both padded.
  void (*round_both)(const float* x, int64_t ld, int64_t rows, int64_t cols, uint16_t* as_is, int64_t ld_as_is,
                     uint16_t* transposed, int64_t ld_transposed);
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::bf16_gemm
