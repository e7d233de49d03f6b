// Columns of embeddings over the batch, a strip of them at a time: what a thread does for a strip happens in its
// caches.
#pragma once
#include <math.h>

#include "../common/parallel.h"
#include "../common/tensor.h"
#include "tiles.h"

namespace sslops {
namespace {

constexpr int64_t kStrip = 64;
constexpr int64_t kDown = 8;  // rows at a time: what belongs to a column stays in registers

using Sums = D[kStrip / kLanes];  // of a strip's columns

SSLOPS_INLINE F narrow(D v) { return __builtin_convertvector(v, F); }

// visit(rows from, to, column of the strip, lanes)
template <typename Visit>
SSLOPS_INLINE void down(int64_t n, int64_t width, Visit&& visit) {
  for (int64_t i = 0; i < n; i += kDown)
    for_each_vector(width, [&](int64_t j, int lanes) { visit(i, i + kDown < n ? i + kDown : n, j, lanes); });
}

inline void store_sums(double* row, int64_t width, const Sums& values) {
  for (int64_t j = 0; j < width; ++j) row[j] = values[j / kLanes][j % kLanes];
}
inline void load_sums(const double* row, int64_t width, Sums& values) {
  for (int64_t j = 0; j < width; ++j) values[j / kLanes][j % kLanes] = row[j];
}

// visit(strip's first column, width, state) in parallel
template <typename Make, typename Visit>
void for_each_strip(int64_t d, const Make& make, const Visit& visit) {
  parallel_tickets((d + kStrip - 1) / kStrip, make, [&](int64_t ticket, auto& state) {
    const int64_t first = ticket * kStrip;
    visit(first, d - first < kStrip ? d - first : kStrip, state);
  });
}

// A view [N, D]: `batches` runs of N / batches rows, each centred by its own mean, or by `moments` [2, D] (mean and
// biased variance); over sqrt(variance + eps) too if scaled.
struct View {
  const void* x;
  DType dtype;
  int64_t n, d;
  bool scaled;
  double eps;
  DType operand;
  int64_t batches;
  const double* moments;

  View(const Tensor& x, bool scaled, double eps, DType operand, int64_t batches = 1, const double* moments = nullptr)
      : x(x.data),
        dtype(x.dtype),
        n(x.sizes[0]),
        d(x.sizes[1]),
        scaled(scaled),
        eps(eps),
        operand(operand),
        batches(batches),
        moments(moments) {}

  SSLOPS_INLINE F at(int64_t i, int64_t j, int lanes) const { return load_as_float(x, dtype, i * d + j, lanes); }
};

// A thread's strip of a view, centred or normalised: `exact`, and `operand` as a matmul has it, panels of kPanel
// columns that gemm() takes on its right. Zeros beyond the view's last column.
class Strip {
 public:
  explicit Strip(const View& v)
      : n_(v.n),
        exact_(n_ * kStrip),
        rounded_(v.operand == DType::f32 ? 0 : n_ * kStrip),
        rounds_(v.operand != DType::f32) {}

  // After this, mean and var are those of the rows of batch `kept`.
  void fill(const View& v, int64_t first, int64_t width, int64_t kept = 0) {
    const int64_t rows = v.n / v.batches;
    for (int64_t j = round_up(width, kLanes); j < kStrip; j += kLanes)
      for (int64_t i = 0; i < n_; ++i)
        store(exact_ + index(i, j), F{}), rounds_ ? store(rounded_ + index(i, j), F{}) : void();
    for (int64_t batch = 0; batch < v.batches; ++batch) {
      Sums m{}, s{};
      read(v, batch * rows, rows, first, width, m);
      if (v.moments) load_sums(v.moments + first, width, m);
      Sums off{};  // what centring by m left
      centre(batch * rows, rows, width, m, s, off);
      if (v.moments) {
        load_sums(v.moments + v.d + first, width, s);
        for (D& each : off) each = D{};
      }
      normalize(v, batch * rows, rows, width, s, off);
      for (int64_t k = 0; k < kStrip / kLanes; ++k) m[k] += off[k];
      if (batch == kept)
        for (int64_t k = 0; k < kStrip / kLanes; ++k) mean[k] = m[k], var[k] = s[k];
    }
  }

  SSLOPS_INLINE F exact(int64_t i, int64_t j) const { return load(exact_ + index(i, j)); }
  SSLOPS_INLINE F operand(int64_t i, int64_t j) const { return load(operands() + index(i, j)); }
  Right right() const { return {operands(), kPanel, n_ * kPanel}; }
  // Rows of a panel of columns, kPanel apart
  const float* panel(int64_t j) const { return operands() + j * n_; }

  Sums mean, var;  // biased

 private:
  SSLOPS_INLINE int64_t index(int64_t i, int64_t j) const { return (j / kPanel * n_ + i) * kPanel + j % kPanel; }
  const float* operands() const { return rounds_ ? rounded_ : exact_; }

  // Once, for rows a power of two apart do not stay in the caches; m: the mean, nearly. From the first row on, which
  // lies at most sqrt(N) standard deviations from it: constant columns are exact.
  void read(const View& v, int64_t row, int64_t rows, int64_t first, int64_t width, Sums& m) {
    F shift[kStrip / kLanes];
    for_each_vector(width, [&](int64_t j, int lanes) { shift[j / kLanes] = v.at(row, first + j, lanes); });
    down(rows, width, [&](int64_t i, int64_t end, int64_t j, int lanes) {
      const F from = shift[j / kLanes];
      F total{};
      for (; i < end; ++i) {
        const int64_t ahead = (row + i + kDown) * v.d + first + j;
        __builtin_prefetch(static_cast<const char*>(v.x) + ahead * (v.dtype == DType::f32 ? 4 : 2));
        const F x = v.at(row + i, first + j, lanes);
        store(exact_ + index(row + i, j), x);
        total += x - from;
      }
      m[j / kLanes] += widen(total);
    });
    for_each_vector(width, [&](int64_t j, int) {
      const int64_t k = j / kLanes;
      m[k] = m[k] / static_cast<double>(rows) + widen(shift[k]);
    });
  }

  // x - m, in two steps: the first is exact or nearly so where x is near m. s: the variance; off: the mean of what is
  // left.
  void centre(int64_t row, int64_t rows, int64_t width, const Sums& m, Sums& s, Sums& off) {
    F far[kStrip / kLanes], near[kStrip / kLanes];
    for_each_vector(width, [&](int64_t j, int) {
      const int64_t k = j / kLanes;
      far[k] = narrow(m[k]);
      near[k] = narrow(m[k] - widen(far[k]));
    });
    down(rows, width, [&](int64_t i, int64_t end, int64_t j, int) {
      const int64_t k = j / kLanes;
      F total{};
      D squares{};
      for (; i < end; ++i) {
        float* const at = exact_ + index(row + i, j);
        const F x = (load(at) - far[k]) - near[k];
        store(at, x);
        total += x;
        squares += widen(x) * widen(x);
      }
      off[k] += widen(total);
      s[k] += squares;
    });
    for_each_vector(width, [&](int64_t j, int) {
      const int64_t k = j / kLanes;
      off[k] /= static_cast<double>(rows);
      s[k] = s[k] / static_cast<double>(rows) - off[k] * off[k];
      s[k] = nonnegative(s[k]);
    });
  }

  void normalize(const View& v, int64_t row, int64_t rows, int64_t width, const Sums& s, const Sums& off) {
    F scale[kStrip / kLanes], rest[kStrip / kLanes];
    for_each_vector(width, [&](int64_t j, int) {
      const int64_t k = j / kLanes;
      D inverse{};
      for (int lane = 0; lane < kLanes; ++lane) inverse[lane] = v.scaled ? 1. / sqrt(s[k][lane] + v.eps) : 1.;
      scale[k] = narrow(inverse);
      rest[k] = narrow(off[k]);
    });
    down(rows, width, [&](int64_t i, int64_t end, int64_t j, int) {
      const F by = scale[j / kLanes], left = rest[j / kLanes];
      for (; i < end; ++i) {
        const int64_t at = index(row + i, j);
        const F a = (load(exact_ + at) - left) * by;
        store(exact_ + at, a);
        if (rounds_) store(rounded_ + at, round_to(v.operand, a));
      }
    });
  }

  int64_t n_;
  Buffer<float> exact_, rounded_;
  bool rounds_;
};

// The gradient of a strip of normalised columns on its way back: rows of out from (mean(g) and mean(a g)), or those
// means into `means` [2, D]. g(i, j) and a(i, j, ..) of the `rows` rows that were normalised together.
template <typename G, typename A>
SSLOPS_INLINE void gradient_means(int64_t rows, int64_t width, const G& g, const A& a, Sums& mean, Sums& along) {
  down(rows, width, [&](int64_t i, int64_t end, int64_t j, int lanes) {
    F total{}, product{};
    for (; i < end; ++i) {
      const F v = g(i, j, lanes);
      total += v;
      product += v * a(i, j);
    }
    mean[j / kLanes] += widen(total);
    along[j / kLanes] += widen(product);
  });
  const double inverse = 1. / static_cast<double>(rows);
  for (int64_t k = 0; k < round_up(width, kLanes) / kLanes; ++k) mean[k] *= inverse, along[k] *= inverse;
}

// dx = grad rstd (g - mean(g) - a mean(a g)), a = (x - mean) rstd
template <typename G, typename A>
SSLOPS_INLINE void normalize_backward(int64_t rows, int64_t width, const G& g, const A& a, const Sums& mean,
                                      const Sums& along, const Sums& var, double eps, double grad, const Tensor& out,
                                      int64_t first) {
  F mean32[kStrip / kLanes], along32[kStrip / kLanes], scale[kStrip / kLanes];
  for_each_vector(width, [&](int64_t j, int) {
    const int64_t k = j / kLanes;
    mean32[k] = narrow(mean[k]);
    along32[k] = narrow(along[k]);
    D factor{};
    for (int lane = 0; lane < kLanes; ++lane) factor[lane] = grad / sqrt(var[k][lane] + eps);
    scale[k] = narrow(factor);
  });
  const int64_t d = out.sizes[1];
  down(rows, width, [&](int64_t i, int64_t end, int64_t j, int lanes) {
    const int64_t k = j / kLanes;
    for (; i < end; ++i)
      store_from_float(out.data, out.dtype, i * d + first + j, lanes,
                       (g(i, j, lanes) - mean32[k] - a(i, j) * along32[k]) * scale[k]);
  });
}

// Of all columns, g [N, D]; means [2, D]: those of all ranks, or null for its own
inline void normalize_backward(const View& v, const float* g, const double* means, double grad, const Tensor& out) {
  for_each_strip(
      v.d, [&] { return Strip(v); },
      [&](int64_t first, int64_t width, Strip& strip) {
        strip.fill(v, first, width);
        const auto at = [&](int64_t i, int64_t j, int lanes) {
          return load_lanes(g + i * v.d + first + j, lanes, 0.f);
        };
        const auto exact = [&](int64_t i, int64_t j) { return strip.exact(i, j); };
        Sums mean{}, along{};
        if (means)
          load_sums(means + first, width, mean), load_sums(means + v.d + first, width, along);
        else
          gradient_means(v.n, width, at, exact, mean, along);
        normalize_backward(v.n, width, at, exact, mean, along, strip.var, v.eps, grad, out, first);
      });
}

}  // namespace
}  // namespace sslops
