#include "vicreg.h"

#include "correlation.h"
#include "gram.h"
#include "rows.h"
#include "tournament.h"

namespace sslops::vicreg {
namespace {

// Of one view: [D] each
struct Moments {
  float *mean, *var, *own;  // biased; S_ii, or -1 of a view by panels

  Moments(const Tensor& moments, int64_t k) : mean(moments.as<float>() + 3 * k * moments.sizes[2]) {
    var = mean + moments.sizes[2], own = var + moments.sizes[2];
  }
  bool by_panels() const { return *own < 0.f; }
  void keep(const Strip& strip, int64_t first, int64_t width) const {
    for_each_vector(width, [&](int64_t j, int lanes) {
      store_lanes(mean + first + j, lanes, narrow(strip.mean[j / kLanes]));
      store_lanes(var + first + j, lanes, narrow(strip.var[j / kLanes]));
    });
  }
};

double squares_of(const float* row, int64_t count) {
  D squares{};
  for_each_vector(count, [&](int64_t j, int lanes) {
    const D v = widen(load_lanes(row + j, lanes, 0.f));
    squares += v * v;
  });
  return sum(squares);
}

// Rows [first, first + rows) of gram [rows, N] = Z Z^T; returns the sum of its squares
double gram_of(const Tensor& z, DType operand, int64_t first, int64_t rows, const Moments& moments, float* to) {
  const View v(z, false, 0., operand);
  Transposed a(v);
  for_each_strip(
      v.d, [&] { return Strip(v); },
      [&](int64_t from, int64_t width, Strip& strip) {
        strip.fill(v, from, width);
        moments.keep(strip, from, width);
        Sums own{};
        down(v.n, width, [&](int64_t i, int64_t end, int64_t j, int) {
          F part{};
          for (; i < end; ++i) part += strip.operand(i, j) * strip.operand(i, j);
          own[j / kLanes] += widen(part);
        });
        for_each_vector(
            width, [&](int64_t j, int lanes) { store_lanes(moments.own + from + j, lanes, narrow(own[j / kLanes])); });
        a.pack(strip, from, width);
      });
  return gram<1>({&a}, first, rows, to);
}

// t [N, D], if there is one, = Z S without S's diagonal; returns the sum of the squares off it
double panels_of(const Tensor& z, DType operand, const Moments* moments, float* t) {
  const Matrix a(View(z, false, 0., operand), [&](int64_t first, int64_t width, const Strip& strip) {
    if (!moments) return;
    moments->keep(strip, first, width);
    for (int64_t j = first; j < first + width; ++j) moments->own[j] = -1.f;
  });
  constexpr int64_t ld = stride_of(kSide);
  const int64_t panels = a.panels;
  Matrix products(t ? a.n : 0, a.d);
  Buffer<double> squares(panels * panels);
  Tournament(panels).run([&] { return Buffer<float>(2 * kSide * ld); },
                         [&](int64_t i, int64_t j, Buffer<float>& s) {
                           float* const transposed = s + kSide * ld;
                           multiply(a, i, a, j, s, ld);
                           double total = 0.;
                           for (int64_t k = 0; k < a.width(i); ++k) {
                             if (i == j) s[k * ld + k] = 0.f;
                             total += squares_of(s + k * ld, a.width(j));
                           }
                           squares[i * panels + j] = i == j ? total : 2. * total;
                           if (!t) return;
                           multiply_back(a, i, s, ld, a.width(j), products, j, i != j);
                           if (i == j) return;
                           transpose(s, a.width(i), a.width(j), ld, transposed, ld);
                           multiply_back(a, j, transposed, ld, a.width(i), products, i, true);
                         });
  if (t) products.copy_to(t);
  double total = 0.;
  for (int64_t i = 0; i < panels; ++i)
    for (int64_t j = i; j < panels; ++j) total += squares[i * panels + j];
  return total;
}

double off_diagonal(Tensor s, int64_t first) {
  return sum_rows(s.sizes[0], [&](int64_t i) {
    float* const row = s.as<float>() + i * s.sizes[1];
    row[first + i] = 0.f;
    return squares_of(row, s.sizes[1]);
  });
}

// Of `rows` rows of two views, from `first`: sum of (x - y)^2
double squared_distance(const Tensor& x, const Tensor& y, int64_t first, int64_t rows) {
  const int64_t d = x.sizes[1];
  return sum_rows(rows, [&](int64_t i) {
    D squares{};
    for_each_vector(d, [&](int64_t j, int lanes) {
      const int64_t at = (first + i) * d + j;
      const D v = widen(load_as_float(x.data, x.dtype, at, lanes)) - widen(load_as_float(y.data, y.dtype, at, lanes));
      squares += v * v;
    });
    return sum(squares);
  });
}

void grams(Tensors views, DType operand, int64_t first, Tensor moments, Tensor grams, Tensor sums) {
  const int64_t n = views.data[0].sizes[0], rows = grams ? grams.sizes[1] : n;
  double* const to = sums.as<double>();
  for (int64_t k = 0; k < views.count; ++k) {
    const Moments own(moments, k);
    to[k] = 0.;
    if (grams)
      to[k] = gram_of(views.data[k], operand, first, rows, own, grams.as<float>() + k * rows * n);
    else
      *own.own = -1.f;
  }
  to[views.count] = views.count == 2 ? squared_distance(views.data[0], views.data[1], first, rows) : 0.;
}

void choose(Tensor moments, Tensor sums) {
  for (int64_t k = 0; k < moments.sizes[0]; ++k) {
    const Moments own(moments, k);
    if (own.by_panels()) continue;
    double &total = sums.as<double>()[k], diagonal = squares_of(own.own, moments.sizes[2]);
    if (keeps_digits(diagonal, total))
      total -= diagonal;
    else
      *own.own = -1.f;
  }
}

// Of columns from j: the standard deviation, at least 1 beyond the last
SSLOPS_INLINE D deviation(const float* var, int64_t j, int lanes, int64_t n, double eps) {
  D found = widen(load_lanes(var + j, lanes, 1.f)) * (static_cast<double>(n) / static_cast<double>(n - 1)) + eps;
  for (int lane = 0; lane < kLanes; ++lane) found[lane] = sqrt(found[lane]);
  return found;
}

double loss(double invariance, double variance, double covariance, double eps, int64_t n, Tensor moments, Tensor sums) {
  const int64_t views = moments.sizes[0], d = moments.sizes[2];
  const double *const of = sums.as<double>(), wide = static_cast<double>(d), rows = static_cast<double>(n);
  double total = 0.;
  for (int64_t k = 0; k < views; ++k) {
    D hinge{};
    for_each_vector(d, [&](int64_t j, int lanes) {
      hinge += nonnegative(1. - deviation(Moments(moments, k).var, j, lanes, n, eps));
    });
    total += variance * sum(hinge) / (2. * wide) + covariance * of[k] / (wide * (rows - 1.) * (rows - 1.));
  }
  return total + invariance * of[views] / (rows * wide);
}

double forward(Tensors views, bool by_gram, double invariance, double variance, double covariance, double eps,
               DType operand, Tensor moments, Tensor kept, Tensor sums) {
  const int64_t n = views.data[0].sizes[0], d = moments.sizes[2];
  grams(views, operand, 0, moments, by_gram ? kept : Tensor{}, sums);
  choose(moments, sums);
  for (int64_t k = 0; k < views.count; ++k) {
    const Moments own(moments, k);
    float* const t = by_gram || !kept ? nullptr : kept.as<float>() + k * n * d;
    if (own.by_panels()) sums.as<double>()[k] = panels_of(views.data[k], operand, &own, t);
  }
  return loss(invariance, variance, covariance, eps, n, moments, sums);
}

void backward(double grad, Tensors views, bool by_gram, double invariance, double variance, double covariance,
              double eps, DType operand, int64_t n, int64_t first, Tensor of_all, Tensor moments, Tensor kept,
              Tensors dz) {
  constexpr int64_t kStride = stride_of(kStrip);
  const double wide = static_cast<double>(moments.sizes[2]), less = static_cast<double>(n - 1);
  const float w = static_cast<float>(4. * covariance / (wide * less * less) * grad),
              p = static_cast<float>(2. * invariance / (static_cast<double>(n) * wide) * grad);
  for (int64_t k = 0; k < views.count; ++k) {
    const Tensor &z = views.data[k], &out = dz.data[k];
    if (!out) continue;
    const Moments own(moments, k);
    const View v(z, false, 0., operand, 1, of_all ? of_all.as<double>() + 2 * k * z.sizes[1] : nullptr);
    const int64_t rows = out.sizes[0], d = v.d;
    const bool after_all = by_gram && own.by_panels();
    const float* const gram = by_gram && !after_all ? kept.as<float>() + k * rows * v.n : nullptr;
    Buffer<float> made(after_all ? v.n * d : 0);
    if (after_all) panels_of(z, operand, nullptr, made);
    const float* const t = after_all ? static_cast<float*>(made) : kept.as<float>() + k * rows * d;
    struct State {
      Strip strip;
      Buffer<float> product;
    };
    for_each_strip(
        d, [&] { return State{Strip(v), Buffer<float>(gram ? rows * kStride : 0)}; },
        [&](int64_t from, int64_t width, State& state) {
          auto& [strip, product] = state;
          strip.fill(v, from, width);
          if (gram) gemm(rows, width, v.n, {gram, v.n, 1}, strip.right(), product, kStride, false);
          F spread[kStrip / kLanes];
          for_each_vector(width, [&](int64_t j, int lanes) {
            const D std = deviation(own.var + from, j, lanes, n, eps);
            const F near = narrow(std), slope = narrow(-variance * grad / (2. * wide * less) / std);
            // A constant column's standard deviation has 0 among its subgradients.
            spread[j / kLanes] = select(near > 0.f & near < 1.f, slope, F{});
          });
          down(rows, width, [&](int64_t i, int64_t end, int64_t j, int lanes) {
            const F of_variance = spread[j / kLanes];
            const F diagonal = gram ? load_lanes(own.own + from + j, lanes, 0.f) : F{};
            for (; i < end; ++i) {
              const int64_t at = (first + i) * d + from + j;
              const F off = gram ? load(product + i * kStride + j) - strip.operand(first + i, j) * diagonal
                                 : load_lanes(t + i * d + from + j, lanes, 0.f);
              F value = off * w + strip.exact(first + i, j) * of_variance;
              if (views.count == 2)
                value += (load_as_float(z.data, z.dtype, at, lanes) -
                          load_as_float(views.data[1 - k].data, z.dtype, at, lanes)) *
                         p;
              store_from_float(out.data, out.dtype, i * d + from + j, lanes, value);
            }
          });
        });
  }
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{together<forward>, together<backward>, together<grams>, choose, together<off_diagonal>, loss};
}

}  // namespace sslops::vicreg
