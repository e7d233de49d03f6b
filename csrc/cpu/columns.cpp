#include "columns.h"

#include "strips.h"

namespace sslops::columns {
namespace {

void moments(Tensors views, Tensor moments) {
  for (int64_t k = 0; k < views.count; ++k) {
    const View v(views.data[k], false, 0., DType::f32);
    double* const to = moments.as<double>() + 2 * k * v.d;
    for_each_strip(
        v.d, [&] { return Strip(v); },
        [&](int64_t first, int64_t width, Strip& strip) {
          strip.fill(v, first, width);
          store_sums(to + first, width, strip.mean);
          store_sums(to + v.d + first, width, strip.var);
        });
  }
}

void normalize(Tensor z, double eps, Tensor moments, DType operand, Tensor a) {
  const View v(z, eps >= 0., eps, operand, 1, moments.as<double>());
  for_each_strip(
      v.d, [&] { return Strip(v); },
      [&](int64_t first, int64_t width, Strip& strip) {
        strip.fill(v, first, width);
        down(v.n, width, [&](int64_t i, int64_t end, int64_t j, int lanes) {
          for (; i < end; ++i) store_lanes(a.as<float>() + i * v.d + first + j, lanes, strip.operand(i, j));
        });
      });
}

// The k-th of the views, and where its rows begin in what is [V, 2, D]
View normalized(const Tensors& views, int64_t k, double eps, const Tensor& moments) {
  const Tensor& z = views.data[k];
  return {z, true, eps, DType::f32, 1, moments.as<double>() + 2 * k * z.sizes[1]};
}

void gradient_means(Tensors views, double eps, Tensor moments, Tensors g, Tensor means) {
  for (int64_t k = 0; k < views.count; ++k) {
    const View v = normalized(views, k, eps, moments);
    if (!g.data[k]) continue;
    double* const to = means.as<double>() + 2 * k * v.d;
    for_each_strip(
        v.d, [&] { return Strip(v); },
        [&](int64_t first, int64_t width, Strip& strip) {
          strip.fill(v, first, width);
          const auto at = [&](int64_t i, int64_t j, int lanes) {
            return load_lanes(g.data[k].as<float>() + i * v.d + first + j, lanes, 0.f);
          };
          Sums mean{}, along{};
          sslops::gradient_means(v.n, width, at, [&](int64_t i, int64_t j) { return strip.exact(i, j); }, mean, along);
          store_sums(to + first, width, mean);
          store_sums(to + v.d + first, width, along);
        });
  }
}

void normalize_backward(double grad, Tensors views, double eps, Tensor moments, Tensors g, Tensor means, Tensors dz) {
  for (int64_t k = 0; k < views.count; ++k) {
    const View v = normalized(views, k, eps, moments);
    if (dz.data[k])
      sslops::normalize_backward(v, g.data[k].as<float>(), means.as<double>() + 2 * k * v.d, grad, dz.data[k]);
  }
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{together<moments>, normalize, together<gradient_means>, together<normalize_backward>};
}

}  // namespace sslops::columns
