#include "masked_patch_mse.h"
#include "patches.cuh"

namespace sslops::masked_patch_mse {
namespace {

constexpr unsigned kThreads = 128;
constexpr int kSize = 4;  // values that a thread takes at a time

// The sum of x over the block, to all its threads.
template <typename T>
__device__ T block_sum(T x) {
  __shared__ T part[kThreads];
  part[threadIdx.x] = x;
  __syncthreads();
  for (unsigned half = kThreads / 2; half; half /= 2) {
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  const T total = part[0];
  __syncthreads();
  return total;
}

// Value e of the target's patch at `from`, before it is normalised.
__device__ float value(const Target& t, const Factors& factors, int64_t from, Layout layout, int64_t e) {
  const Place at = place(t.patches, layout, e);
  return scaled(factors, pixel(t.images, t.dtype, from + at.offset), at.channel);
}

__device__ Normal normal_of(const Target& t, const Factors& factors, int64_t from) {
  const int64_t size = patch_size(t.patches);
  const auto x = [&](int64_t e) { return value(t, factors, from, Layout::chw, e); };
  float total = 0.f, differences = 0.f, squares = 0.f;
  for (int64_t e = threadIdx.x; e < size; e += blockDim.x) total += x(e);
  const float mean = block_sum(total) / size, share = 1.f / size;
  for (int64_t e = threadIdx.x; e < size; e += blockDim.x) {
    const float d = x(e) - mean;
    differences += d;
    squares += d * (d * share);
  }
  differences = block_sum(differences);
  return normal(size, mean, differences, block_sum(squares), t.eps);
}

// take(e, n, difference): values e .. e + n of pred - target of patch i, of which this thread takes its share.
template <typename Take>
__device__ void for_each_difference(const Prediction& pred, const Target& t, const Factors& factors, unsigned i,
                                    const Take& take) {
  const Patches& p = t.patches;
  const unsigned count = static_cast<unsigned>(patch_count(p));  // 32 bits: no call
  const int64_t size = patch_size(p), image = i / count, id = i % count, from = corner(p, image, id);
  const Normal norm = t.normalized ? normal_of(t, factors, from) : Normal{0.f, 0.f, 1.f};
  for (int64_t e = kSize * threadIdx.x; e < size; e += kSize * blockDim.x) {
    const int n = static_cast<int>(size - e < kSize ? size - e : kSize);
    float difference[kSize];
    read(pred.data, pred.dtype, image * pred.image_stride + id * pred.patch_stride + e, n, difference);
    for (int u = 0; u < kSize; ++u)
      difference[u] -= u < n ? apply(norm, value(t, factors, from, Layout::hwc, e + u)) : 0.f;
    take(e, n, difference);
  }
}

__global__ void __launch_bounds__(kThreads)
    forward(Prediction pred, Target t, Factors factors, const float* mask, float* errors) {
  const unsigned i = blockIdx.x;
  float squares = 0.f;
  if (mask[i] != 0.f)
    for_each_difference(pred, t, factors, i, [&](int64_t, int, float (&d)[kSize]) {
      for (const float each : d) squares += each * each;  // 0 past the end
    });
  const float total = block_sum(squares);
  if (threadIdx.x == 0) errors[i] = total / patch_size(t.patches);
}

__global__ void __launch_bounds__(kThreads)
    finish(const float* errors, const float* mask, int64_t n, float* loss, float* inverse) {
  double error = 0., weight = 0.;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    error += static_cast<double>(mask[i]) * errors[i];
    weight += mask[i];
  }
  error = block_sum(error);
  weight = block_sum(weight);
  if (threadIdx.x == 0) {
    const double over = weight == 0. ? 0. : 1. / weight;
    *loss = static_cast<float>(error * over);
    *inverse = static_cast<float>(over);
  }
}

__global__ void __launch_bounds__(kThreads) backward(Prediction pred, Target t, Factors factors, const float* mask,
                                                     const float* grad, const float* inverse, void* d_pred) {
  const unsigned i = blockIdx.x;
  const int64_t size = patch_size(t.patches);
  const float weight = 2.f / size * *grad * *inverse * mask[i];
  const auto put = [&](int64_t e, int n, float (&d)[kSize]) {
    for (float& each : d) each *= weight;
    write(d_pred, pred.dtype, i * size + e, n, d);
  };
  if (mask[i] != 0.f) return for_each_difference(pred, t, factors, i, put);
  for (int64_t e = kSize * threadIdx.x; e < size; e += kSize * blockDim.x) {
    const float zero[kSize] = {};
    write(d_pred, pred.dtype, i * size + e, static_cast<int>(size - e < kSize ? size - e : kSize), zero);
  }
}

}  // namespace

void cuda_forward(Prediction pred, Target t, const Factors& factors, const float* mask, float* errors, float* loss,
                  float* inverse, void* stream) {
  const int64_t patches = t.patches.images * patch_count(t.patches);
  if (patches > 0) launch(forward, patches, kThreads, stream, pred, t, factors, mask, errors);
  launch(finish, 1, kThreads, stream, errors, mask, patches, loss, inverse);
}

void cuda_backward(Prediction pred, Target t, const Factors& factors, const float* mask, const float* grad,
                   const float* inverse, void* d_pred, void* stream) {
  const int64_t patches = t.patches.images * patch_count(t.patches);
  if (patches > 0) launch(backward, patches, kThreads, stream, pred, t, factors, mask, grad, inverse, d_pred);
}

const CudaTable& cuda_table() {
  static constexpr CudaTable table{
      [](Tensor pred, Tensor images, Tensor mask, int64_t frames, int64_t height, int64_t width, Tensor factors,
         bool normalized, double eps, Tensor errors, Tensor loss, Tensor inverse, Stream stream) {
        cuda_forward(prediction(pred), target(images, frames, height, width, normalized, eps),
                     packed("masked_patch_mse", factors), mask.as<float>(), errors.as<float>(), loss.as<float>(),
                     inverse.as<float>(), stream.handle);
      },
      [](Tensor pred, Tensor images, Tensor mask, int64_t frames, int64_t height, int64_t width, Tensor factors,
         bool normalized, double eps, Tensor grad, Tensor inverse, Tensor d_pred, Stream stream) {
        cuda_backward(prediction(pred), target(images, frames, height, width, normalized, eps),
                      packed("masked_patch_mse", factors), mask.as<float>(), grad.as<float>(), inverse.as<float>(),
                      d_pred.data, stream.handle);
      }};
  return table;
}

}  // namespace sslops::masked_patch_mse
