#include "masked_patch_mse.h"

#include "../common/huge_pages.h"
#include "../common/parallel.h"
#include "patches.h"

namespace sslops::masked_patch_mse {
namespace {

// Sum of term(j, lanes), in four parts that need not wait for each other.
template <typename Term>
SSLOPS_INLINE float sum_of(int64_t n, Term&& term) {
  F part[4]{};
  int64_t done = 0;
  for (; done + 4 * kLanes <= n; done += 4 * kLanes)
    for (int k = 0; k < 4; ++k) part[k] += term(done + k * kLanes, kLanes);
  for_each_vector(n - done, [&](int64_t j, int lanes) { part[0] += term(done + j, lanes); });
  return sum((part[0] + part[1]) + (part[2] + part[3]));
}

Normal normal_of(const float* x, int64_t n, float eps) {
  const float mean = sum_of(n, [&](int64_t j, int lanes) { return load_lanes(x + j, lanes, 0.f); }) / n;
  const auto difference = [&](int64_t j, int lanes) { return load_lanes(x + j, lanes, mean) - mean; };
  const float differences = sum_of(n, difference);
  const float share = 1.f / n;
  const float mean_square = sum_of(n, [&](int64_t j, int lanes) {
    const F d = difference(j, lanes);
    return d * (d * share);
  });
  return normal(n, mean, differences, mean_square, eps);
}

Sums loss(Prediction pred, Target t, const float* factors, const float* mask, float grad, float* errors, void* d_pred) {
  const Patches& p = t.patches;
  const int64_t size = patch_size(p), count = patch_count(p), patches = p.images * count;
  const int64_t row = size * (pred.dtype == DType::f32 ? 4 : 2);
  Sums sums{};
  for (int64_t i = 0; i < patches; ++i) sums.weight += mask[i];
  const double coefficient = sums.weight == 0. ? 0. : 2. / size * grad / sums.weight;
  parallel_for(patches, 8, [&](int64_t begin, int64_t end) {
    const Scratch<float> planes(2 * size);
    const auto of_pred = [&](int64_t i) { return i / count * pred.image_stride + i % count * pred.patch_stride; };
    const auto of_image = [&](int64_t i) { return corner(p, i / count, i % count); };
    for (int64_t i = begin; i < end; ++i) {
      if (mask[i] == 0.f) {
        errors[i] = 0.f;
        if (d_pred) std::memset(static_cast<char*>(d_pred) + i * row, 0, row);
        continue;
      }
      int64_t next = i + 1;
      while (next < end && mask[next] == 0.f) ++next;
      if (next == end) next = i;
      load_planes(t.images, t.dtype, p, of_image(i), of_image(next), planes.data);
      if (factors) scale_planes(planes.data, p, factors);
      const Normal norm = t.normalized ? normal_of(planes.data, size, t.eps) : Normal{0.f, 0.f, 1.f};
      const float* const x = arrange(planes.data, p, Layout::hwc, planes.data + size);
      const int64_t from = of_pred(i), ahead = of_pred(next);
      const float weight = static_cast<float>(coefficient * mask[i]);
      const float squares = sum_of(size, [&](int64_t j, int lanes) {
        prefetch(pred.data, pred.dtype, ahead + j);
        F d = load_as_float(pred.data, pred.dtype, from + j, lanes) - apply(norm, load_lanes(x + j, lanes, 0.f));
        if (d_pred) store_from_float(d_pred, pred.dtype, i * size + j, lanes, d * weight);
        if (lanes < kLanes) d = load(reinterpret_cast<const float*>(&d), lanes, 0.f);  // the others must not count
        return d * d;
      });
      errors[i] = squares / size;
    }
  });
  for (int64_t i = 0; i < patches; ++i) sums.error += static_cast<double>(mask[i]) * errors[i];
  return sums;
}

void call_forward(Tensor pred, Tensor images, Tensor mask, int64_t frames, int64_t height, int64_t width,
                  Tensor factors, bool normalized, double eps, Tensor errors, Tensor result, Tensor inverse,
                  Tensor d_pred) {
  on_huge_pages(d_pred);
  const Sums sums = loss(prediction(pred), target(images, frames, height, width, normalized, eps), factors.as<float>(),
                         mask.as<float>(), 1.f, errors.as<float>(), d_pred.data);
  const double over = sums.weight == 0. ? 0. : 1. / sums.weight;
  *result.as<float>() = static_cast<float>(sums.error * over);
  *inverse.as<float>() = static_cast<float>(over);
}

void call_backward(Tensor pred, Tensor images, Tensor mask, int64_t frames, int64_t height, int64_t width,
                   Tensor factors, bool normalized, double eps, Tensor grad, Tensor, Tensor d_pred) {
  on_huge_pages(d_pred);
  const Scratch<float> errors(mask.numel);
  loss(prediction(pred), target(images, frames, height, width, normalized, eps), factors.as<float>(), mask.as<float>(),
       *grad.as<float>(), errors.data, d_pred.data);
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{loss, call_forward, call_backward};
}

}  // namespace sslops::masked_patch_mse
