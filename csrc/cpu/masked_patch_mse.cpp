#include "masked_patch_mse.h"

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

// masked(i, difference) for each masked patch i of [B, L], difference(j, lanes) being pred - target there; visible(i)
// for the others.
template <typename Masked, typename Visible>
void for_each_patch(const Prediction& pred, const Target& t, const float* mask, const Masked& masked,
                    const Visible& visible) {
  const Patches& p = t.patches;
  const int64_t size = patch_size(p), count = patch_count(p);
  parallel_for(p.images * count, 8, [&](int64_t begin, int64_t end) {
    const Scratch<float> planes(2 * size);
    for (int64_t i = begin; i < end; ++i) {
      if (mask[i] == 0.f) {
        visible(i);
        continue;
      }
      load_planes(t.images, t.dtype, p, corner(p, i / count, i % count), planes.data);
      const Normal norm = t.normalized ? normal_of(planes.data, size, t.eps) : Normal{0.f, 0.f, 1.f};
      const float* const x = arrange(planes.data, p, Layout::hwc, planes.data + size);
      const int64_t from = i / count * pred.image_stride + i % count * pred.patch_stride;
      masked(i, [&](int64_t j, int lanes) {
        const F predicted = load_as_float(pred.data, pred.dtype, from + j, lanes);
        const F d = predicted - apply(norm, load_lanes(x + j, lanes, 0.f));
        return lanes == kLanes ? d : load(reinterpret_cast<const float*>(&d), lanes, 0.f);  // others must not count
      });
    }
  });
}

Sums forward(Prediction pred, Target target, const float* mask, float* errors) {
  const int64_t size = patch_size(target.patches);
  for_each_patch(
      pred, target, mask,
      [&](int64_t i, const auto& difference) {
        errors[i] = sum_of(size,
                           [&](int64_t j, int lanes) {
                             const F d = difference(j, lanes);
                             return d * d;
                           }) /
                    size;
      },
      [&](int64_t i) { errors[i] = 0.f; });
  Sums sums{};
  for (int64_t i = 0; i < target.patches.images * patch_count(target.patches); ++i) {
    sums.error += static_cast<double>(mask[i]) * errors[i];
    sums.weight += mask[i];
  }
  return sums;
}

void backward(Prediction pred, Target target, const float* mask, float coefficient, void* d_pred) {
  const int64_t size = patch_size(target.patches);
  for_each_patch(
      pred, target, mask,
      [&](int64_t i, const auto& difference) {
        const float weight = coefficient * mask[i];
        for_each_vector(size, [&](int64_t j, int lanes) {
          store_from_float(d_pred, pred.dtype, i * size + j, lanes, difference(j, lanes) * weight);
        });
      },
      [&](int64_t i) {
        for_each_vector(size,
                        [&](int64_t j, int lanes) { store_from_float(d_pred, pred.dtype, i * size + j, lanes, F{}); });
      });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{forward, backward};
}

}  // namespace sslops::masked_patch_mse
