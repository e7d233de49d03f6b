// Columns of embeddings over the batch: their moments, batch normalisation and the way back through it.
// A panel is P columns, from `first`, of a [N, D] matrix; panels of float32 are contiguous, [N, P].
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace sslops::columns {

struct Panel {
  int64_t n, d, first, p;
};

// g = weight t + b slope [N, P], a gradient; t has row stride ld; b and slope may be null.
struct Gradient {
  const float* t;
  int64_t ld;
  double weight;
  const float *b, *slope;
};

struct Table {
  // mean [P], var [P] (biased) of x [N, D], or what moments [2, D] says; a [N, P]: x - mean, over sqrt(var + eps) if
  // scaled.
  void (*normalize)(const void* x, DType dtype, Panel panel, bool scaled, double eps, const double* moments, float* a,
                    float* mean, float* var);
  // moments [2, D] = (mean, biased variance) of x [N, D]
  void (*moments)(const void* x, DType dtype, int64_t n, int64_t d, double* moments);
  // c [P] = sum over rows of a b / N
  void (*diagonal)(const float* a, const float* b, int64_t n, int64_t p, float* c);
  // sum of x y
  double (*inner)(const float* x, const float* y, int64_t size);
  // means [2, P] = mean(g), mean(a g)
  void (*gradient_means)(Gradient g, const float* a, int64_t n, int64_t p, double* means);
  // dx[:, panel] = grad rstd (g - mean(g) - a mean(a g)), a = (x - mean) rstd; means as gradient_means has them, or
  // null.
  void (*normalize_backward)(Gradient g, const float* a, const double* means, const float* var, double eps, double grad,
                             Panel panel, DType dtype, void* dx);
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::columns
