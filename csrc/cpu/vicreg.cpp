#include "vicreg.h"

#include "correlation.h"
#include "gram.h"
#include "rows.h"
#include "tournament.h"

namespace sslops::vicreg {
namespace {

// Mean and biased variance of a strip
void keep(const Strip& strip, int64_t first, int64_t width, const Tensor& moments) {
  float* const to = moments.as<float>() + first;
  for_each_vector(width, [&](int64_t j, int lanes) {
    store_lanes(to + j, lanes, narrow(strip.mean[j / kLanes]));
    store_lanes(to + moments.sizes[1] + j, lanes, narrow(strip.var[j / kLanes]));
  });
}

double forward_gram(Tensor z, DType operand, int64_t first, Tensor moments, Tensor grams) {
  const View v(z, false, 0., operand);
  Transposed a(v);
  for_each_strip(
      v.d, [&] { return Strip(v); },
      [&](int64_t from, int64_t width, Strip& strip) {
        strip.fill(v, from, width);
        keep(strip, from, width, moments);
        Sums own{};
        down(v.n, width, [&](int64_t i, int64_t end, int64_t j, int) {
          F part{};
          for (; i < end; ++i) part += strip.operand(i, j) * strip.operand(i, j);
          own[j / kLanes] += widen(part);
        });
        for_each_vector(width, [&](int64_t j, int lanes) {
          store_lanes(moments.as<float>() + 2 * v.d + from + j, lanes, narrow(own[j / kLanes]));
        });
        a.pack(strip, from, width);
      });
  return gram<1>({&a}, first, grams.sizes[0], grams.as<float>());
}

double squares_of(const float* row, int64_t count) {
  D squares{};
  for_each_vector(count, [&](int64_t j, int lanes) {
    const D v = widen(load_lanes(row + j, lanes, 0.f));
    squares += v * v;
  });
  return sum(squares);
}

double forward_panels(Tensor z, DType operand, Tensor moments, Tensor t) {
  const Matrix a(View(z, false, 0., operand), [&](int64_t first, int64_t width, const Strip& strip) {
    keep(strip, first, width, moments);
    for (int64_t j = first; j < first + width; ++j) moments.as<float>()[2 * moments.sizes[1] + j] = 0.f;
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
  if (t) products.copy_to(t.as<float>());
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

double squared_distance(Tensor x, Tensor y) {
  const int64_t d = x.sizes[1];
  return sum_rows(x.sizes[0], [&](int64_t i) {
    D squares{};
    for_each_vector(d, [&](int64_t j, int lanes) {
      const D v = widen(load_as_float(x.data, x.dtype, i * d + j, lanes)) -
                  widen(load_as_float(y.data, y.dtype, i * d + j, lanes));
      squares += v * v;
    });
    return sum(squares);
  });
}

void backward(double grad, Tensor z, Tensor other, DType operand, int64_t first, Tensor of_all, Tensor t, Tensor grams,
              Tensor moments, double weight, Tensor spread, double pull, Tensor dz) {
  constexpr int64_t kStride = stride_of(kStrip);
  const View v(z, false, 0., operand, 1, of_all);
  const int64_t rows = dz.sizes[0], d = v.d;
  const float w = static_cast<float>(weight * grad), p = static_cast<float>(pull * grad), g = static_cast<float>(grad);
  struct State {
    Strip strip;
    Buffer<float> t;
  };
  for_each_strip(
      d, [&] { return State{Strip(v), Buffer<float>(grams ? rows * kStride : 0)}; },
      [&](int64_t from, int64_t width, State& state) {
        auto& [strip, product] = state;
        strip.fill(v, from, width);
        if (grams) gemm(rows, width, v.n, {grams.as<float>(), v.n, 1}, strip.right(), product, kStride, false);
        down(rows, width, [&](int64_t i, int64_t end, int64_t j, int lanes) {
          const F of_variance = load_lanes(spread.as<float>() + from + j, lanes, 0.f) * g;
          const F own = grams ? load_lanes(moments.as<float>() + 2 * d + from + j, lanes, 0.f) : F{};
          for (; i < end; ++i) {
            const int64_t at = (first + i) * d + from + j;
            const F off = grams ? load(product + i * kStride + j) - strip.operand(first + i, j) * own
                                : load_lanes(t.as<float>() + i * d + from + j, lanes, 0.f);
            F value = off * w + strip.exact(first + i, j) * of_variance;
            if (other)
              value += (load_as_float(z.data, z.dtype, at, lanes) - load_as_float(other.data, z.dtype, at, lanes)) * p;
            store_from_float(dz.data, dz.dtype, i * d + from + j, lanes, value);
          }
        });
      });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{together<forward_gram>, together<forward_panels>, together<off_diagonal>,
                         together<squared_distance>, together<backward>};
}

}  // namespace sslops::vicreg
