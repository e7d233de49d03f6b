#include "columns.h"

#include "../common/parallel.h"
#include "vec.h"

namespace sslops::columns {
namespace {

constexpr int64_t kStrip = 64;       // columns that one thread takes down all rows: a few cache lines of each
constexpr int64_t kBlock = 1 << 14;  // elements that one thread takes; fixed, so that sums do not depend on threads

// fn(first column, columns) in parallel
template <typename Fn>
void for_each_strip(int64_t p, Fn&& fn) {
  parallel_for((p + kStrip - 1) / kStrip, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * kStrip; j < end * kStrip && j < p; j += kStrip) fn(j, p - j < kStrip ? p - j : kStrip);
  });
}

SSLOPS_INLINE D widen(F v) { return __builtin_convertvector(v, D); }

// visit(row, column of the strip, lanes, value) down the rows of x
template <typename Visit>
SSLOPS_INLINE void down(const void* x, DType dtype, Panel c, int64_t strip, int64_t width, Visit&& visit) {
  for (int64_t i = 0; i < c.n; ++i)
    for_each_vector(width, [&](int64_t j, int lanes) {
      visit(i, j, lanes, widen(load_as_float(x, dtype, i * c.d + c.first + strip + j, lanes)));
    });
}

using Strip = D[kStrip / kLanes];

SSLOPS_INLINE void strip_moments(const void* x, DType dtype, Panel c, int64_t strip, int64_t width, Strip& mean,
                                 Strip& var) {
  const double inv_n = 1. / static_cast<double>(c.n);
  down(x, dtype, c, strip, width, [&](int64_t, int64_t j, int, D v) { mean[j / kLanes] += v; });
  for (D& m : mean) m *= inv_n;
  down(x, dtype, c, strip, width, [&](int64_t, int64_t j, int, D v) {
    v -= mean[j / kLanes];
    var[j / kLanes] += v * v;
  });
  for (D& v : var) v *= inv_n;
}

// A strip of a row of doubles, to or from vectors.
SSLOPS_INLINE void store_strip(double* row, int64_t width, const Strip& values) {
  for (int64_t j = 0; j < width; ++j) row[j] = values[j / kLanes][j % kLanes];
}
SSLOPS_INLINE void load_strip(const double* row, int64_t width, Strip& values) {
  for (int64_t j = 0; j < width; ++j) values[j / kLanes][j % kLanes] = row[j];
}

void moments(const void* x, DType dtype, int64_t n, int64_t d, double* moments) {
  for_each_strip(d, [&](int64_t strip, int64_t width) {
    Strip mean{}, var{};
    strip_moments(x, dtype, {n, d, 0, d}, strip, width, mean, var);
    store_strip(moments + strip, width, mean);
    store_strip(moments + d + strip, width, var);
  });
}

void normalize(const void* x, DType dtype, Panel c, bool scaled, double eps, const double* moments, float* a,
               float* means, float* vars) {
  for_each_strip(c.p, [&](int64_t strip, int64_t width) {
    Strip mean{}, var{};
    if (moments) {
      load_strip(moments + c.first + strip, width, mean);
      load_strip(moments + c.d + c.first + strip, width, var);
    } else {
      strip_moments(x, dtype, c, strip, width, mean, var);
    }
    F scale[kStrip / kLanes];
    for_each_vector(width, [&](int64_t j, int lanes) {
      const D biased = var[j / kLanes];
      store_lanes(means + strip + j, lanes, __builtin_convertvector(mean[j / kLanes], F));
      store_lanes(vars + strip + j, lanes, __builtin_convertvector(biased, F));
      D inverse{};
      for (int k = 0; k < kLanes; ++k) inverse[k] = scaled ? 1. / __builtin_sqrt(biased[k] + eps) : 1.;
      scale[j / kLanes] = __builtin_convertvector(inverse, F);
    });
    down(x, dtype, c, strip, width, [&](int64_t i, int64_t j, int lanes, D v) {
      const F centred = __builtin_convertvector(v - mean[j / kLanes], F);
      store_lanes(a + i * c.p + strip + j, lanes, centred * scale[j / kLanes]);
    });
  });
}

void diagonal(const float* a, const float* b, int64_t n, int64_t p, float* c) {
  for_each_strip(p, [&](int64_t strip, int64_t width) {
    D total[kStrip / kLanes]{};
    for (int64_t i = 0; i < n; ++i)
      for_each_vector(width, [&](int64_t j, int lanes) {
        const int64_t at = i * p + strip + j;
        total[j / kLanes] += widen(load_lanes(a + at, lanes, 0.f)) * widen(load_lanes(b + at, lanes, 0.f));
      });
    for_each_vector(width, [&](int64_t j, int lanes) {
      store_lanes(c + strip + j, lanes, __builtin_convertvector(total[j / kLanes] / static_cast<double>(n), F));
    });
  });
}

double inner(const float* x, const float* y, int64_t size) {
  constexpr int64_t kMax = 4096;
  const int64_t parts = (size + kBlock - 1) / kBlock < kMax ? (size + kBlock - 1) / kBlock : kMax;
  double part[kMax];
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      D total{};
      for (int64_t block = k * kBlock; block < size; block += parts * kBlock)
        for_each_vector(size - block < kBlock ? size - block : kBlock, [&](int64_t j, int lanes) {
          total += widen(load_lanes(x + block + j, lanes, 0.f)) * widen(load_lanes(y + block + j, lanes, 0.f));
        });
      part[k] = sum(total);
    }
  });
  double total = 0.;
  for (int64_t k = 0; k < parts; ++k) total += part[k];
  return total;
}

SSLOPS_INLINE F at(const Gradient& g, int64_t i, int64_t p, int64_t column, int lanes) {
  F v = load_lanes(g.t + i * g.ld + column, lanes, 0.f) * static_cast<float>(g.weight);
  if (g.b) v += load_lanes(g.b + i * p + column, lanes, 0.f) * load_lanes(g.slope + column, lanes, 0.f);
  return v;
}

SSLOPS_INLINE void strip_gradient_means(const Gradient& g, const float* a, int64_t n, int64_t p, int64_t strip,
                                        int64_t width, Strip& mean, Strip& along) {
  for (int64_t i = 0; i < n; ++i)
    for_each_vector(width, [&](int64_t j, int lanes) {
      const D v = widen(at(g, i, p, strip + j, lanes));
      mean[j / kLanes] += v;
      along[j / kLanes] += v * widen(load_lanes(a + i * p + strip + j, lanes, 0.f));
    });
  const double inv_n = 1. / static_cast<double>(n);
  for (D& m : mean) m *= inv_n;
  for (D& m : along) m *= inv_n;
}

void gradient_means(Gradient g, const float* a, int64_t n, int64_t p, double* means) {
  for_each_strip(p, [&](int64_t strip, int64_t width) {
    Strip mean{}, along{};
    strip_gradient_means(g, a, n, p, strip, width, mean, along);
    store_strip(means + strip, width, mean);
    store_strip(means + p + strip, width, along);
  });
}

void normalize_backward(Gradient g, const float* a, const double* means, const float* var, double eps, double grad,
                        Panel c, DType dtype, void* dx) {
  for_each_strip(c.p, [&](int64_t strip, int64_t width) {
    Strip mean{}, along{};
    if (means) {
      load_strip(means + strip, width, mean);
      load_strip(means + c.p + strip, width, along);
    } else {
      strip_gradient_means(g, a, c.n, c.p, strip, width, mean, along);
    }
    F mean32[kStrip / kLanes], along32[kStrip / kLanes], scale[kStrip / kLanes];
    for_each_vector(width, [&](int64_t j, int lanes) {
      const int64_t k = j / kLanes;
      mean32[k] = __builtin_convertvector(mean[k], F);
      along32[k] = __builtin_convertvector(along[k], F);
      D factor = widen(load_lanes(var + strip + j, lanes, 1.f)) + eps;
      for (int lane = 0; lane < kLanes; ++lane) factor[lane] = grad / __builtin_sqrt(factor[lane]);
      scale[k] = __builtin_convertvector(factor, F);
    });
    for (int64_t i = 0; i < c.n; ++i)
      for_each_vector(width, [&](int64_t j, int lanes) {
        const F own = load_lanes(a + i * c.p + strip + j, lanes, 0.f);
        const F v =
            (at(g, i, c.p, strip + j, lanes) - mean32[j / kLanes] - own * along32[j / kLanes]) * scale[j / kLanes];
        store_from_float(dx, dtype, i * c.d + c.first + strip + j, lanes, v);
      });
  });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{normalize, moments, diagonal, inner, gradient_means, normalize_backward};
}

}  // namespace sslops::columns
