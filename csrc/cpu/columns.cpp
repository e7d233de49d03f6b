#include "columns.h"

#include "../common/parallel.h"
#include "vec.h"

namespace sslops::columns {
namespace {

constexpr int64_t kStrip = 512;      // columns that go down all rows together, their sums in the first-level cache
constexpr int64_t kRows = 8;         // at a time, a vector of columns after the other
constexpr int64_t kPart = 64;        // of a strip, so many columns or more are one thread's
constexpr int64_t kBlock = 1 << 14;  // elements that one thread takes; fixed, so that sums do not depend on threads

// fn(first column, columns) in parallel
template <typename Fn>
void for_each_strip(int64_t p, Fn&& fn) {
  parallel_for((p + kPart - 1) / kPart, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = end * kPart < p ? end * kPart : p;
    for (int64_t j = begin * kPart; j < last; j += kStrip) fn(j, last - j < kStrip ? last - j : kStrip);
  });
}

SSLOPS_INLINE D widen(F v) { return __builtin_convertvector(v, D); }

using Strip = D[kStrip / kLanes];

// visit(rows from, to, column of the strip, lanes): what belongs to a column stays in registers for kRows rows
template <typename Visit>
SSLOPS_INLINE void down(int64_t n, int64_t width, Visit&& visit) {
  for (int64_t i = 0; i < n; i += kRows)
    for_each_vector(width, [&](int64_t j, int lanes) { visit(i, i + kRows < n ? i + kRows : n, j, lanes); });
}

SSLOPS_INLINE D value(const void* x, DType dtype, Panel c, int64_t i, int64_t column, int lanes) {
  return widen(load_as_float(x, dtype, i * c.d + c.first + column, lanes));
}

// In one pass, of the differences from the first row: it lies at most sqrt(N) standard deviations from the mean, so
// that double has digits to spare.
void strip_moments(const void* x, DType dtype, Panel c, int64_t strip, int64_t width, Strip& mean, Strip& var) {
  Strip shift;
  for_each_vector(width, [&](int64_t j, int lanes) { shift[j / kLanes] = value(x, dtype, c, 0, strip + j, lanes); });
  down(c.n, width, [&](int64_t i, int64_t end, int64_t j, int lanes) {
    const int64_t k = j / kLanes;
    const D from = shift[k];
    D total{}, squares{};
    for (; i < end; ++i) {
      const int64_t ahead = (i + kRows) * c.d + c.first + strip + j;
      __builtin_prefetch(static_cast<const char*>(x) + ahead * (dtype == DType::f32 ? 4 : 2));
      const D v = value(x, dtype, c, i, strip + j, lanes) - from;
      total += v;
      squares += v * v;
    }
    mean[k] += total;
    var[k] += squares;
  });
  const double inv_n = 1. / static_cast<double>(c.n);
  for_each_vector(width, [&](int64_t j, int) {
    const int64_t k = j / kLanes;
    const D v = mean[k] * inv_n;
    mean[k] = v + shift[k];
    var[k] = var[k] * inv_n - v * v;
  });
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
    down(c.n, width, [&](int64_t i, int64_t end, int64_t j, int lanes) {
      const D from = mean[j / kLanes];
      const F by = scale[j / kLanes];
      for (; i < end; ++i) {
        const F centred = __builtin_convertvector(value(x, dtype, c, i, strip + j, lanes) - from, F);
        store_lanes(a + i * c.p + strip + j, lanes, centred * by);
      }
    });
  });
}

void diagonal(const float* a, const float* b, int64_t n, int64_t p, float* c) {
  for_each_strip(p, [&](int64_t strip, int64_t width) {
    D total[kStrip / kLanes]{};
    down(n, width, [&](int64_t i, int64_t end, int64_t j, int lanes) {
      D sum{};
      for (; i < end; ++i) {
        const int64_t at = i * p + strip + j;
        sum += widen(load_lanes(a + at, lanes, 0.f)) * widen(load_lanes(b + at, lanes, 0.f));
      }
      total[j / kLanes] += sum;
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

// of columns whose slope is given
SSLOPS_INLINE F at(const Gradient& g, int64_t i, int64_t p, int64_t column, int lanes, F slope) {
  const F v = load_lanes(g.t + i * g.ld + column, lanes, 0.f) * static_cast<float>(g.weight);
  return g.b ? v + load_lanes(g.b + i * p + column, lanes, 0.f) * slope : v;
}
SSLOPS_INLINE F slope_of(const Gradient& g, int64_t column, int lanes) {
  return g.b ? load_lanes(g.slope + column, lanes, 0.f) : F{};
}

void strip_gradient_means(const Gradient& g, const float* a, int64_t n, int64_t p, int64_t strip, int64_t width,
                          Strip& mean, Strip& along) {
  down(n, width, [&](int64_t i, int64_t end, int64_t j, int lanes) {
    const int64_t column = strip + j;
    const F slope = slope_of(g, column, lanes);
    D total{}, product{};
    for (; i < end; ++i) {
      const D v = widen(at(g, i, p, column, lanes, slope));
      total += v;
      product += v * widen(load_lanes(a + i * p + column, lanes, 0.f));
    }
    mean[j / kLanes] += total;
    along[j / kLanes] += product;
  });
  const double inv_n = 1. / static_cast<double>(n);
  for_each_vector(width, [&](int64_t j, int) {
    mean[j / kLanes] *= inv_n;
    along[j / kLanes] *= inv_n;
  });
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
    down(c.n, width, [&](int64_t i, int64_t end, int64_t j, int lanes) {
      const int64_t k = j / kLanes, column = strip + j;
      const F slope = slope_of(g, column, lanes);
      for (; i < end; ++i) {
        const F own = load_lanes(a + i * c.p + column, lanes, 0.f);
        const F v = (at(g, i, c.p, column, lanes, slope) - mean32[k] - own * along32[k]) * scale[k];
        store_from_float(dx, dtype, i * c.d + c.first + column, lanes, v);
      }
    });
  });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{normalize, moments, diagonal, inner, gradient_means, normalize_backward};
}

}  // namespace sslops::columns
