// What masked patches should be predicted as, and how far a prediction is from it.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "patches.h"

namespace sslops::masked_prediction {

// The error of a patch: the mean over its values of the first three, 1 - cosine as a whole. In Python's order.
enum class Loss : int { squared, l1, smooth_l1, cosine };
// What the target is brought to mean 0 and variance 1 over: nothing, a patch, each channel of a patch, a patch with the
// biased variance of a layer norm. In Python's order.
enum class Norm : int { none, patch, channel, layer };

constexpr float kSmallest = 1e-12f;  // length, as F.normalize has it

// Predicted patches [B, L, patch_size] in the target's layout.
struct Prediction {
  const void* data;
  DType dtype;
  int64_t image_stride, patch_stride;  // in elements; the values of a patch lie side by side
};

struct Target {
  const void* images;
  DType dtype;
  Patches patches;
  Layout layout;
  Norm norm;
  float eps;
};

// The loss, and beta, where smooth_l1 passes from one form to the other.
struct Error {
  Loss loss;
  float beta;
};

SSLOPS_HOST Prediction prediction(const Tensor& pred) {
  return {pred.data, pred.dtype, pred.strides[0], pred.strides[1]};
}

SSLOPS_HOST Target target(const Tensor& images, int64_t frames, int64_t height, int64_t width, bool hwc, int64_t norm,
                          double eps) {
  return {images.data, images.dtype, patches_of(images, frames, height, width),
          Layout(hwc), Norm(norm),   static_cast<float>(eps)};
}

SSLOPS_HOST Error error(int64_t loss, double beta) { return {Loss(loss), static_cast<float>(beta)}; }

// Of how many errors that of a patch is the mean.
SSLOPS_HOST_DEVICE int64_t terms(const Error& error, const Patches& p) {
  return error.loss == Loss::cosine ? 1 : patch_size(p);
}

// A value becomes ((x - mean) - rest) scale.
struct Normal {
  float mean, rest, scale;
};

// Of n values, from their mean and from the sums of x - mean and of (x - mean)^2 / n (which does not overflow before
// the variance does). What was rounded off the mean is the mean of the differences from it.
SSLOPS_HOST_DEVICE Normal normal(Norm norm, int64_t n, float mean, float differences, float mean_square, float eps) {
  const float rest = differences / n;
  // an infinite mean square stays infinite, however large the rest is
  const float square = rest * rest < FLT_MAX ? rest * rest : FLT_MAX;
  const float biased = mean_square < square ? 0.f : mean_square - square;
  const float correction = norm == Norm::layer ? 1.f : static_cast<float>(n) / (n - 1);
  if (norm == Norm::channel) return {mean, rest, 1.f / (sqrtf(biased * correction) + eps)};
  return {mean, rest, 1.f / sqrtf(biased * correction + eps)};
}

template <typename T>
SSLOPS_HOST_DEVICE T apply(const Normal& n, T x) {
  return ((x - n.mean) - n.rest) * n.scale;
}

// 1 - cosine of two vectors of lengths p and x, from their product and squares, and its gradient of the first one,
// of_p p - of_x x.
struct PatchError {
  float error, of_p, of_x;
};
SSLOPS_HOST_DEVICE PatchError cosine(float product, float squares_p, float squares_x) {
  const float p = sqrtf(squares_p), over_p = 1.f / (p > kSmallest ? p : kSmallest);
  const float x = sqrtf(squares_x), over_x = 1.f / (x > kSmallest ? x : kSmallest);
  const float similarity = product * over_p * over_x;
  return {1.f - similarity, p > kSmallest ? similarity * over_p * over_p : 0.f, over_p * over_x};
}

}  // namespace sslops::masked_prediction
