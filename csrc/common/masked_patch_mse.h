// The loss of MAE on one patch: what its pixels should be predicted as.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "patches.h"

namespace sslops::masked_patch_mse {

// Predicted patches [B, L, patch_size], channels last in each.
struct Prediction {
  const void* data;
  DType dtype;
  int64_t image_stride, patch_stride;  // in elements; the values of a patch lie side by side
};

struct Target {
  const void* images;
  DType dtype;
  Patches patches;
  bool normalized;  // each patch to mean 0 and unbiased variance 1, with eps
  float eps;
};

SSLOPS_HOST Prediction prediction(const Tensor& pred) {
  return {pred.data, pred.dtype, pred.strides[0], pred.strides[1]};
}

SSLOPS_HOST Target target(const Tensor& images, int64_t frames, int64_t height, int64_t width, bool normalized,
                          double eps) {
  return {images.data, images.dtype, patches_of(images, frames, height, width), normalized, static_cast<float>(eps)};
}

// A pixel becomes ((x - mean) - rest) scale.
struct Normal {
  float mean, rest, scale;
};

// Of n pixels, from their mean and from the sums of x - mean and of (x - mean)^2 / n (which does not overflow before
// the variance does). What was rounded off the mean is the mean of the differences from it.
SSLOPS_HOST_DEVICE Normal normal(int64_t n, float mean, float differences, float mean_square, float eps) {
  const float rest = differences / n;
  // an infinite mean square stays infinite, however large the rest is
  const float square = rest * rest < FLT_MAX ? rest * rest : FLT_MAX;
  const float variance = (mean_square - square) * (static_cast<float>(n) / (n - 1));
  return {mean, rest, 1.f / sqrtf(variance + eps)};
}

template <typename T>
SSLOPS_HOST_DEVICE T apply(const Normal& n, T x) {
  return ((x - n.mean) - n.rest) * n.scale;
}

}  // namespace sslops::masked_patch_mse
