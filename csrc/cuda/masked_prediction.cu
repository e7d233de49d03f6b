#include "masked_prediction.h"
#include "patches.cuh"

namespace sslops::masked_prediction {
namespace {

constexpr unsigned kThreads = 128, kWarp = 32, kWarps = kThreads / kWarp, kAll = 0xffffffffu;
constexpr unsigned kFinal = 1024;  // threads of the sum over all patches
constexpr int kSize = 8;           // values that a lane takes at a time
constexpr int kHeld = 3;           // groups of a lane's values that stay in registers: patches of 768 are read once

__device__ unsigned lane() { return threadIdx.x % kWarp; }

// The sum of x over the warp, to all its lanes.
template <typename T>
__device__ T warp_sum(T x) {
  for (unsigned apart = kWarp / 2; apart; apart /= 2) x += __shfl_xor_sync(kAll, x, apart);
  return x;
}

// The target's patch at `from`, or a channel of it: n values from the first one on.
struct Span {
  int64_t from;
  Layout layout;
  unsigned first, n;
};

// Values e .. e + kSize of the span before they are normalised, 0 past its end.
template <typename Image>
__device__ void fetch(const Target& t, const Factors& factors, const Divisors& by, const Span& s, unsigned e,
                      float (&x)[kSize]) {
  const Patches& p = t.patches;
  Walk at(p, by, s.layout, s.first + e);
  const Image* const images = static_cast<const Image*>(t.images) + s.from;
  if (s.layout == Layout::chw && p.pixel_stride == 1 && p.width % kSize == 0) {  // in one row
    Image raw[kSize];
    load(images, at.offset, kSize, raw);
    for (int u = 0; u < kSize; ++u) x[u] = scaled(factors, to_float(raw[u], t.dtype), at.channel);
    return;
  }
#pragma unroll
  for (unsigned u = 0; u < kSize; ++u) {
    x[u] = e + u < s.n ? scaled(factors, to_float(images[at.offset], t.dtype), at.channel) : 0.f;
    at.next(p, s.layout);
  }
}

// use(e, x): a lane's values of the span, by groups from e on.
template <typename Image, typename Use>
__device__ void for_each_group(const Target& t, const Factors& factors, const Divisors& by, const Span& s,
                               float (&held)[kHeld][kSize], const Use& use) {
#pragma unroll
  for (unsigned k = 0; k < kHeld; ++k)
    if (const unsigned e = kSize * (lane() + k * kWarp); e < s.n) use(e, held[k]);
  for (unsigned e = kSize * (lane() + kHeld * kWarp); e < s.n; e += kSize * kWarp) {
    float x[kSize];
    fetch<Image>(t, factors, by, s, e, x);
    use(e, x);
  }
}

// What the span is normalised by, and its first values, which a lane holds.
template <typename Image>
__device__ Normal normal_of(const Target& t, const Factors& factors, const Divisors& by, const Span& s,
                            float (&held)[kHeld][kSize]) {
#pragma unroll
  for (unsigned k = 0; k < kHeld; ++k)
    if (const unsigned e = kSize * (lane() + k * kWarp); e < s.n) fetch<Image>(t, factors, by, s, e, held[k]);
  if (t.norm == Norm::none) return {0.f, 0.f, 1.f};
  float total = 0.f, differences = 0.f, squares = 0.f;
  for_each_group<Image>(t, factors, by, s, held, [&](unsigned, float (&x)[kSize]) {
    for (int u = 0; u < kSize; ++u) total += x[u];  // 0 past the end
  });
  const float share = 1.f / s.n, mean = warp_sum(total) / s.n;
  for_each_group<Image>(t, factors, by, s, held, [&](unsigned e, float (&x)[kSize]) {
    for (unsigned u = 0; u < kSize; ++u) {
      const float d = e + u < s.n ? x[u] - mean : 0.f;
      differences += d;
      squares += d * (d * share);
    }
  });
  return normal(t.norm, s.n, mean, warp_sum(differences), warp_sum(squares), t.eps);
}

// take(e, step, n, predicted, wanted): values e, e + step .. of patch i, n of them, of which this lane takes its share;
// 0 past the end. With a norm of each channel those of one after the other.
template <typename Image, typename Take>
__device__ void for_each_value(const Prediction& pred, const Target& t, const Factors& factors, const Divisors& by,
                               unsigned i, const Take& take) {
  const Patches& p = t.patches;
  const unsigned count = static_cast<unsigned>(patch_count(p)), image = i / count, id = i % count;  // 32 bits: no call
  const unsigned channels = t.norm == Norm::channel ? by.channels.by : 1;
  const unsigned step = t.norm == Norm::channel && t.layout == Layout::hwc ? channels : 1;
  const int64_t first = image * pred.image_stride + id * pred.patch_stride;
  Span s{corner(p, image, id), t.norm == Norm::channel ? Layout::chw : t.layout, 0,
         by.area.by * (t.norm == Norm::channel ? 1 : by.channels.by)};
  for (unsigned c = 0; c < channels; ++c, s.first += s.n) {
    float held[kHeld][kSize];
    const Normal norm = normal_of<Image>(t, factors, by, s, held);
    for_each_group<Image>(t, factors, by, s, held, [&](unsigned e, float (&x)[kSize]) {
      const int n = static_cast<int>(s.n - e < kSize ? s.n - e : kSize);
      const unsigned at = step == 1 ? s.first + e : c + e * step;
      float predicted[kSize] = {}, wanted[kSize];
      if (step == 1)
        read(pred.data, pred.dtype, first + at, n, predicted);
      else
        for (int u = 0; u < n; ++u) predicted[u] = pixel(pred.data, pred.dtype, first + at + u * step);
      for (int u = 0; u < kSize; ++u) wanted[u] = u < n ? apply(norm, x[u]) : 0.f;
      take(at, step, n, predicted, wanted);
    });
  }
}

// Of a difference d, what its error is, and its slope; over_beta: 1 / beta.
__device__ float error_of(const Error& error, float over_beta, float d) {
  const float size = d < 0.f ? -d : d;
  if (error.loss == Loss::squared) return d * d;
  if (error.loss == Loss::l1) return size;
  return size < error.beta ? d * d * (0.5f * over_beta) : size - 0.5f * error.beta;
}
__device__ float slope_of(const Error& error, float over_beta, float d) {
  const float sign = d > 0.f ? 1.f : d < 0.f ? -1.f : 0.f;
  if (error.loss == Loss::squared) return d + d;
  if (error.loss == Loss::l1) return sign;
  return d > error.beta || d < -error.beta ? sign : d * over_beta;
}

template <typename Image>
__device__ PatchError of_patch(const Prediction& pred, const Target& t, const Factors& factors, const Divisors& by,
                               const Error& error, unsigned i) {
  const bool is_cosine = error.loss == Loss::cosine;
  const float over_beta = 1.f / error.beta;
  float found = 0.f, of_pred = 0.f, of_target = 0.f;
  for_each_value<Image>(pred, t, factors, by, i, [&](unsigned, unsigned, int, float (&p)[kSize], float (&x)[kSize]) {
    for (int u = 0; u < kSize; ++u) {
      found += is_cosine ? p[u] * x[u] : error_of(error, over_beta, p[u] - x[u]);
      of_pred += p[u] * p[u];
      of_target += x[u] * x[u];
    }
  });
  found = warp_sum(found);
  if (!is_cosine) return {found / patch_size(t.patches), 0.f, 0.f};
  return cosine(found, warp_sum(of_pred), warp_sum(of_target));
}

// A warp for each patch.
__device__ unsigned patch_index() { return blockIdx.x * kWarps + threadIdx.x / kWarp; }

template <typename Image>
__global__ void __launch_bounds__(kThreads, 5)
    forward(Prediction pred, Target t, Factors factors, Divisors by, Error error, const float* mask, float* errors) {
  const unsigned i = patch_index();
  if (i >= t.patches.images * patch_count(t.patches)) return;
  const float weight = mask[i];
  const float found = weight == 0.f ? 0.f : of_patch<Image>(pred, t, factors, by, error, i).error;
  if (lane() == 0) errors[i] = weight * found;
}

__global__ void __launch_bounds__(kFinal)
    finish(const float* errors, const float* mask, int64_t n, float* loss, float* inverse) {
  __shared__ double parts[2][kFinal / kWarp];
  constexpr int kFour = 4;
  double error = 0., weight = 0.;
  for (int64_t i = kFour * threadIdx.x; i < n; i += kFour * kFinal) {
    const int count = static_cast<int>(n - i < kFour ? n - i : kFour);
    float e[kFour], w[kFour];
    load(errors, i, count, e);
    load(mask, i, count, w);
    for (int u = 0; u < kFour; ++u) error += e[u], weight += w[u];
  }
  error = warp_sum(error);
  weight = warp_sum(weight);
  if (lane() == 0) parts[0][threadIdx.x / kWarp] = error, parts[1][threadIdx.x / kWarp] = weight;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  error = warp_sum(parts[0][lane()]);
  weight = warp_sum(parts[1][lane()]);
  if (lane() > 0) return;
  const double over = weight == 0. ? 0. : 1. / weight;
  *loss = static_cast<float>(error * over);
  *inverse = static_cast<float>(over);
}

// grad: of the mean, beside inverse, or of each patch, without.
template <typename Image>
__global__ void __launch_bounds__(kThreads, 4)
    backward(Prediction pred, Target t, Factors factors, Divisors by, Error error, const float* mask, const float* grad,
             const float* inverse, void* d_pred) {
  const unsigned i = patch_index();
  const int64_t size = patch_size(t.patches);
  if (i >= t.patches.images * patch_count(t.patches)) return;
  if (mask[i] == 0.f) {
    for (int64_t e = kSize * lane(); e < size; e += kSize * kWarp) {
      const float zero[kSize] = {};
      write(d_pred, pred.dtype, i * size + e, static_cast<int>(size - e < kSize ? size - e : kSize), zero);
    }
    return;
  }
  const float weight = 1.f / terms(error, t.patches) * (inverse ? *grad * *inverse : grad[i]) * mask[i];
  const bool is_cosine = error.loss == Loss::cosine;
  const float over_beta = 1.f / error.beta;
  const PatchError c = is_cosine ? of_patch<Image>(pred, t, factors, by, error, i) : PatchError{};
  for_each_value<Image>(
      pred, t, factors, by, i, [&](unsigned e, unsigned step, int n, float (&p)[kSize], float (&x)[kSize]) {
        for (int u = 0; u < kSize; ++u)
          p[u] = weight * (is_cosine ? p[u] * c.of_p - x[u] * c.of_x : slope_of(error, over_beta, p[u] - x[u]));
        if (step == 1)
          write(d_pred, pred.dtype, i * size + e, n, p);
        else
          for (int u = 0; u < n; ++u) set_pixel(d_pred, pred.dtype, i * size + e + u * step, p[u]);
      });
}

// The blocks for all patches, whose indices have 32 bits.
int64_t blocks_for(int64_t patches) {
  if (patches > INT32_MAX) throw std::runtime_error("too many patches for one launch");
  return (patches + kWarps - 1) / kWarps;
}

// run(image): with a value of the type that the images' elements are loaded as.
template <typename Run>
void by_type(DType dtype, const Run& run) {
  if (dtype == DType::f32)
    run(float{});
  else if (dtype == DType::u8)
    run(uint8_t{});
  else
    run(uint16_t{});
}

}  // namespace

void cuda_forward(Prediction pred, Target t, Error error, const Factors& factors, const float* mask, float* errors,
                  float* loss, float* inverse, void* stream) {
  const int64_t patches = t.patches.images * patch_count(t.patches);
  if (patches > 0)
    by_type(t.dtype, [&](auto image) {
      launch(forward<decltype(image)>, blocks_for(patches), kThreads, stream, pred, t, factors, divisors(t.patches),
             error, mask, errors);
    });
  if (loss) launch(finish, 1, kFinal, stream, errors, mask, patches, loss, inverse);
}

void cuda_backward(Prediction pred, Target t, Error error, const Factors& factors, const float* mask, const float* grad,
                   const float* inverse, void* d_pred, void* stream) {
  const int64_t patches = t.patches.images * patch_count(t.patches);
  if (patches > 0)
    by_type(t.dtype, [&](auto image) {
      launch(backward<decltype(image)>, blocks_for(patches), kThreads, stream, pred, t, factors, divisors(t.patches),
             error, mask, grad, inverse, d_pred);
    });
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
