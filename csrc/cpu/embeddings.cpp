#include "embeddings.h"

#include "../common/parallel.h"
#include "rows.h"
#include "vec.h"

namespace sslops::embeddings {
namespace {

void normalize(const void* x, DType dtype, int64_t n, int64_t d, bool normalize, DType operand, float* z,
               float* inv_norm) {
  parallel_for(n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto at = [&](int64_t j, int lanes) { return load_as_float(x, dtype, i * d + j, lanes); };
      const float inv = normalize ? sslops::inv_norm(x, dtype, i * d, d) : 1.f;
      inv_norm[i] = inv;
      if (!z) continue;
      for_each_vector(
          d, [&](int64_t j, int lanes) { store_lanes(z + i * d + j, lanes, round_to(operand, at(j, lanes) * inv)); });
    }
  });
}

void gradient(const void* x, DType dtype, int64_t n, int64_t d, bool normalize, double tau, const float* inv_norm,
              const float* pull, const float* positive, float* dz, int64_t ld, DType dx_dtype, void* dx, float* dots) {
  const float inv_tau = static_cast<float>(1.0 / tau);
  parallel_for(n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto at = [&](int64_t j, int lanes) { return load_as_float(x, dtype, i * d + j, lanes); };
      const float inv = inv_norm[i];
      float* g = dz + i * ld;
      F product{};
      for_each_vector(d, [&](int64_t j, int lanes) {
        const F v = (load_lanes(g + j, lanes, 0.f) - pull[i] * load_lanes(positive + i * d + j, lanes, 0.f)) * inv_tau;
        store_lanes(g + j, lanes, v);
        product += at(j, lanes) * inv * v;
      });
      const float dot = sum(product);
      dots[i] = dot;
      // At a clamped norm F.normalize is a plain scaling: nothing to project out.
      const bool project = normalize && inv < 1.f / kNormEps;
      for_each_vector(d, [&](int64_t j, int lanes) {
        F v = load_lanes(g + j, lanes, 0.f);
        if (project) v -= at(j, lanes) * (inv * dot);
        store_from_float(dx, dx_dtype, i * d + j, lanes, v * inv);
      });
    }
  });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{normalize, gradient};
}

}  // namespace sslops::embeddings
