#include "columns.h"

#include "rows.h"
#include "strips.h"

namespace sslops::columns {
namespace {

void moments(Tensor z, Tensor moments) {
  const View v(z, false, 0., DType::f32);
  for_each_strip(
      v.d, [&] { return Strip(v); },
      [&](int64_t first, int64_t width, Strip& strip) {
        strip.fill(v, first, width);
        store_sums(moments.as<double>() + first, width, strip.mean);
        store_sums(moments.as<double>() + v.d + first, width, strip.var);
      });
}

void normalize(Tensor z, double eps, Tensor moments, DType operand, Tensor a) {
  const View v(z, eps >= 0., eps, operand, 1, moments);
  for_each_strip(
      v.d, [&] { return Strip(v); },
      [&](int64_t first, int64_t width, Strip& strip) {
        strip.fill(v, first, width);
        down(v.n, width, [&](int64_t i, int64_t end, int64_t j, int lanes) {
          for (; i < end; ++i) store_lanes(a.as<float>() + i * v.d + first + j, lanes, strip.operand(i, j));
        });
      });
}

void gradient_means(Tensor z, double eps, Tensor moments, Tensor g, Tensor means) {
  const View v(z, true, eps, DType::f32, 1, moments);
  for_each_strip(
      v.d, [&] { return Strip(v); },
      [&](int64_t first, int64_t width, Strip& strip) {
        strip.fill(v, first, width);
        const auto at = [&](int64_t i, int64_t j, int lanes) {
          return load_lanes(g.as<float>() + i * v.d + first + j, lanes, 0.f);
        };
        Sums mean{}, along{};
        sslops::gradient_means(v.n, width, at, [&](int64_t i, int64_t j) { return strip.exact(i, j); }, mean, along);
        store_sums(means.as<double>() + first, width, mean);
        store_sums(means.as<double>() + v.d + first, width, along);
      });
}

void normalize_backward(double grad, Tensor z, double eps, Tensor moments, Tensor g, Tensor means, Tensor dz) {
  const View v(z, true, eps, DType::f32, 1, moments);
  for_each_strip(
      v.d, [&] { return Strip(v); },
      [&](int64_t first, int64_t width, Strip& strip) {
        strip.fill(v, first, width);
        const auto at = [&](int64_t i, int64_t j, int lanes) {
          return load_lanes(g.as<float>() + i * v.d + first + j, lanes, 0.f);
        };
        const auto exact = [&](int64_t i, int64_t j) { return strip.exact(i, j); };
        Sums mean{}, along{};
        if (means) {
          load_sums(means.as<double>() + first, width, mean);
          load_sums(means.as<double>() + v.d + first, width, along);
        } else {
          sslops::gradient_means(v.n, width, at, exact, mean, along);
        }
        sslops::normalize_backward(v.n, width, at, exact, mean, along, strip.var, eps, grad, dz, first);
      });
}

double inner(Tensor x, Tensor y) {
  constexpr int64_t kBlock = 1 << 14;
  return sum_rows((x.numel + kBlock - 1) / kBlock, [&](int64_t k) {
    const int64_t first = k * kBlock;
    D total{};
    for_each_vector(x.numel - first < kBlock ? x.numel - first : kBlock, [&](int64_t j, int lanes) {
      total += widen(load_lanes(x.as<float>() + first + j, lanes, 0.f)) *
               widen(load_lanes(y.as<float>() + first + j, lanes, 0.f));
    });
    return sum(total);
  });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{moments, normalize, gradient_means, normalize_backward, together<inner>};
}

}  // namespace sslops::columns
