// Rows of embeddings: to unit length before a loss's matmuls, and their gradient back through that.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace sslops::embeddings {

struct Table {
  // z [N, D] (float32 values as the operand dtype holds them; null: not wanted) and inv_norm [N] from x [N, D].
  void (*normalize)(const void* x, DType dtype, int64_t n, int64_t d, bool normalize, DType operand, float* z,
                    float* inv_norm);
  // dx [N, D] in dx_dtype from dz [N, D] (row stride ld, used up): g = (dz - pull positive) / tau, back through the
  // normalisation; dots [N] = <z, g>, z unrounded. pull [N], positive [N, D].
  void (*gradient)(const void* x, DType dtype, int64_t n, int64_t d, bool normalize, double tau, const float* inv_norm,
                   const float* pull, const float* positive, float* dz, int64_t ld, DType dx_dtype, void* dx,
                   float* dots);
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::embeddings
