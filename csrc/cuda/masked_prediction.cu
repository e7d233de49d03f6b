#include "masked_prediction.h"
#include "patches.cuh"

namespace sslops::masked_prediction {
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

// Of values first .. first + n of the patch at `from`, channels first.
__device__ Normal normal_of(const Target& t, const Factors& factors, int64_t from, int64_t first, int64_t n) {
  const auto x = [&](int64_t e) { return value(t, factors, from, Layout::chw, first + e); };
  float total = 0.f, differences = 0.f, squares = 0.f;
  for (int64_t e = threadIdx.x; e < n; e += blockDim.x) total += x(e);
  const float mean = block_sum(total) / n, share = 1.f / n;
  for (int64_t e = threadIdx.x; e < n; e += blockDim.x) {
    const float d = x(e) - mean;
    differences += d;
    squares += d * (d * share);
  }
  differences = block_sum(differences);
  return normal(t.norm, n, mean, differences, block_sum(squares), t.eps);
}

// take(e, n, predicted, wanted): values e .. e + n of patch i, of which this thread takes its share; 0 past the end.
// With a norm of each channel those of one after the other, one at a time.
template <typename Take>
__device__ void for_each_value(const Prediction& pred, const Target& t, const Factors& factors, unsigned i,
                               const Take& take) {
  const Patches& p = t.patches;
  const unsigned count = static_cast<unsigned>(patch_count(p));  // 32 bits: no call
  const unsigned size = static_cast<unsigned>(patch_size(p)), image = i / count, id = i % count;
  const int64_t from = corner(p, image, id);
  const int64_t first = image * pred.image_stride + id * pred.patch_stride;
  float predicted[kSize], wanted[kSize];
  if (t.norm == Norm::channel) {
    const unsigned area = static_cast<unsigned>(patch_area(p)), channels = static_cast<unsigned>(p.channels);
    for (unsigned c = 0; c < channels; ++c) {
      const Normal norm = normal_of(t, factors, from, c * area, area);
      for (unsigned k = threadIdx.x; k < area; k += kThreads) {
        const unsigned e = t.layout == Layout::chw ? c * area + k : k * channels + c;
        read(pred.data, pred.dtype, first + e, 1, predicted);
        for (int u = 0; u < kSize; ++u) wanted[u] = u ? 0.f : apply(norm, value(t, factors, from, t.layout, e));
        take(e, 1, predicted, wanted);
      }
    }
    return;
  }
  const Normal norm = t.norm == Norm::none ? Normal{0.f, 0.f, 1.f} : normal_of(t, factors, from, 0, size);
  for (unsigned e = kSize * threadIdx.x; e < size; e += kSize * kThreads) {
    const int n = static_cast<int>(size - e < kSize ? size - e : kSize);
    read(pred.data, pred.dtype, first + e, n, predicted);
    for (int u = 0; u < kSize; ++u) wanted[u] = u < n ? apply(norm, value(t, factors, from, t.layout, e + u)) : 0.f;
    take(e, n, predicted, wanted);
  }
}

// Of a difference d, what its error is, and its slope.
__device__ float error_of(const Error& error, float d) {
  const float size = d < 0.f ? -d : d;
  if (error.loss == Loss::squared) return d * d;
  if (error.loss == Loss::l1) return size;
  return size < error.beta ? d * d * (0.5f / error.beta) : size - 0.5f * error.beta;
}
__device__ float slope_of(const Error& error, float d) {
  const float sign = d > 0.f ? 1.f : d < 0.f ? -1.f : 0.f;
  if (error.loss == Loss::squared) return d + d;
  if (error.loss == Loss::l1) return sign;
  return d > error.beta || d < -error.beta ? sign : d * (1.f / error.beta);
}

__device__ PatchError of_patch(const Prediction& pred, const Target& t, const Factors& factors, const Error& error,
                               unsigned i) {
  const bool is_cosine = error.loss == Loss::cosine;
  float found = 0.f, of_pred = 0.f, of_target = 0.f;
  for_each_value(pred, t, factors, i, [&](int64_t, int, float (&p)[kSize], float (&x)[kSize]) {
    for (int u = 0; u < kSize; ++u) {
      found += is_cosine ? p[u] * x[u] : error_of(error, p[u] - x[u]);
      of_pred += p[u] * p[u];
      of_target += x[u] * x[u];
    }
  });
  found = block_sum(found);
  if (!is_cosine) return {found / patch_size(t.patches), 0.f, 0.f};
  of_pred = block_sum(of_pred);
  return cosine(found, of_pred, block_sum(of_target));
}

__global__ void __launch_bounds__(kThreads, 8)  // or 32 registers, and some spilled
    forward(Prediction pred, Target t, Factors factors, Error error, const float* mask, float* errors) {
  const float found = mask[blockIdx.x] == 0.f ? 0.f : of_patch(pred, t, factors, error, blockIdx.x).error;
  if (threadIdx.x == 0) errors[blockIdx.x] = mask[blockIdx.x] * found;
}

__global__ void __launch_bounds__(kThreads)
    finish(const float* errors, const float* mask, int64_t n, float* loss, float* inverse) {
  double error = 0., weight = 0.;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    error += errors[i];
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

// grad: of the mean, beside inverse, or of each patch, without.
__global__ void __launch_bounds__(kThreads)
    backward(Prediction pred, Target t, Factors factors, Error error, const float* mask, const float* grad,
             const float* inverse, void* d_pred) {
  const unsigned i = blockIdx.x;
  const int64_t size = patch_size(t.patches);
  if (mask[i] == 0.f) {
    for (int64_t e = kSize * threadIdx.x; e < size; e += kSize * blockDim.x) {
      const float zero[kSize] = {};
      write(d_pred, pred.dtype, i * size + e, static_cast<int>(size - e < kSize ? size - e : kSize), zero);
    }
    return;
  }
  const float weight = 1.f / terms(error, t.patches) * (inverse ? *grad * *inverse : grad[i]) * mask[i];
  const bool is_cosine = error.loss == Loss::cosine;
  const PatchError c = is_cosine ? of_patch(pred, t, factors, error, i) : PatchError{};
  for_each_value(pred, t, factors, i, [&](int64_t e, int n, float (&p)[kSize], float (&x)[kSize]) {
    for (int u = 0; u < kSize; ++u)
      p[u] = weight * (is_cosine ? p[u] * c.of_p - x[u] * c.of_x : slope_of(error, p[u] - x[u]));
    write(d_pred, pred.dtype, i * size + e, n, p);
  });
}

}  // namespace

void cuda_forward(Prediction pred, Target t, Error error, const Factors& factors, const float* mask, float* errors,
                  float* loss, float* inverse, void* stream) {
  const int64_t patches = t.patches.images * patch_count(t.patches);
  if (patches > 0) launch(forward, patches, kThreads, stream, pred, t, factors, error, mask, errors);
  if (loss) launch(finish, 1, kThreads, stream, errors, mask, patches, loss, inverse);
}

void cuda_backward(Prediction pred, Target t, Error error, const Factors& factors, const float* mask, const float* grad,
                   const float* inverse, void* d_pred, void* stream) {
  const int64_t patches = t.patches.images * patch_count(t.patches);
  if (patches > 0) launch(backward, patches, kThreads, stream, pred, t, factors, error, mask, grad, inverse, d_pred);
}

const CudaTable& cuda_table() {
  static constexpr CudaTable table{
      [](Tensor pred, Tensor images, Tensor mask, int64_t frames, int64_t height, int64_t width, bool hwc,
         Tensor factors, int64_t norm, double eps, int64_t kind, double beta, Tensor errors, Tensor loss,
         Tensor inverse, Stream stream) {
        cuda_forward(prediction(pred), target(images, frames, height, width, hwc, norm, eps), error(kind, beta),
                     packed("masked_prediction", factors), mask.as<float>(), errors.as<float>(), loss.as<float>(),
                     inverse.as<float>(), stream.handle);
      },
      [](Tensor pred, Tensor images, Tensor mask, int64_t frames, int64_t height, int64_t width, bool hwc,
         Tensor factors, int64_t norm, double eps, int64_t kind, double beta, Tensor grad, Tensor inverse,
         Tensor d_pred, Stream stream) {
        cuda_backward(prediction(pred), target(images, frames, height, width, hwc, norm, eps), error(kind, beta),
                      packed("masked_prediction", factors), mask.as<float>(), grad.as<float>(),
                      grad.dim ? nullptr : inverse.as<float>(), d_pred.data, stream.handle);
      }};
  return table;
}

}  // namespace sslops::masked_prediction
