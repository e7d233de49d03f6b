// The CUDA kernels against the CPU's: all losses and norms, dtypes, strides, ragged patches, masks of zeros, ones and
// other weights.
#include "cuda/masked_prediction.cu"

#include <cstdio>
#include <memory>
#include <random>

#include "cpu/masked_prediction.h"

namespace sslops::masked_prediction {
namespace {

int64_t item(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2; }

std::unique_ptr<char[]> numbers(DType dtype, int64_t n, std::mt19937& random) {
  std::unique_ptr<char[]> bytes(new char[n * item(dtype)]);
  std::normal_distribution<float> normal;
  for (int64_t k = 0; k < n; ++k)
    if (dtype == DType::u8)
      bytes[k] = static_cast<char>(random() % 256);
    else
      set_pixel(bytes.get(), dtype, k, normal(random) + 1.f);
  return bytes;
}

bool close(float a, float b, DType dtype) {
  const float unit = dtype == DType::f32 ? 1e-5f : dtype == DType::f16 ? 1e-3f : 8e-3f;
  return std::fabs(a - b) <= unit * (std::fabs(a) + 1e-3f);
}

int compare(const Patches& p, DType dtype, DType images_dtype, Layout layout, Norm norm, Loss kind, int masked,
            std::mt19937& random) {
  const int64_t size = patch_size(p), count = patch_count(p), patches = p.images * count;
  // A token before the patches of each image, as a decoder gives it.
  const std::unique_ptr<char[]> tokens = numbers(dtype, p.images * (count + 1) * size, random);
  const std::unique_ptr<char[]> images = numbers(images_dtype, patches * size, random);
  const std::unique_ptr<float[]> mask(new float[patches]), errors(new float[patches]), others(new float[patches]);
  for (int64_t i = 0; i < patches; ++i) mask[i] = masked == 2 ? 0.5f * (random() % 3) : static_cast<float>(masked);
  const Prediction pred{tokens.get() + size * item(dtype), dtype, (count + 1) * size, size};
  const Target target{images.get(), images_dtype, p, layout, norm, 1e-6f};
  const Error error{kind, 0.7f};

  const std::unique_ptr<char[]> a(new char[patches * size * item(dtype)]), b(new char[patches * size * item(dtype)]);
  float loss = -1.f, inverse = -1.f;
  std::unique_ptr<float[]> grads(new float[patches]);
  for (int64_t i = 0; i < patches; ++i) grads[i] = 1.f + i;
  const float grad = 3.f;
  const bool scaled = images_dtype == DType::u8;
  Factors factors{scaled, {}, {}};
  float rows[2 * kMaxChannels];  // of p.channels
  for (int c = 0; c < p.channels; ++c) {
    rows[c] = factors.scale[c] = (1.f + c) / 255;
    rows[p.channels + c] = factors.shift[c] = 0.5f * c;
  }
  const float* const both = scaled ? rows : nullptr;
  const auto same = [&](const char* a, const char* b, DType of, int64_t n) {
    for (int64_t e = 0; e < n; ++e)
      if (!close(pixel(a, of, e), pixel(b, of, e), of)) return false;
    return true;
  };
  const Sums sums = portable::table.loss(pred, target, error, both, mask.get(), &grad, false, errors.get(), a.get());
  // The sum over all patches takes a thousand threads, so not always.
  const bool mean = dtype == DType::f32 && norm == Norm::patch && p.images == 1 && kind == Loss::squared;
  cuda_forward(pred, target, error, factors, mask.get(), others.get(), mean ? &loss : nullptr, &inverse, nullptr);
  const float wanted = sums.weight == 0. ? 0.f : static_cast<float>(1. / sums.weight);
  if (!mean) loss = static_cast<float>(sums.error) * (inverse = wanted);
  bool right = close(wanted, inverse, DType::f32) && close(static_cast<float>(sums.error) * wanted, loss, DType::f32);
  right =
      right && same(reinterpret_cast<char*>(errors.get()), reinterpret_cast<char*>(others.get()), DType::f32, patches);

  cuda_backward(pred, target, error, factors, mask.get(), &grad, &inverse, b.get(), nullptr);
  right = right && same(a.get(), b.get(), dtype, patches * size);
  portable::table.loss(pred, target, error, both, mask.get(), grads.get(), true, errors.get(), a.get());
  cuda_backward(pred, target, error, factors, mask.get(), grads.get(), nullptr, b.get(), nullptr);
  right = right && same(a.get(), b.get(), dtype, patches * size);
  if (!right)
    std::printf("differs: dtypes %d, %d, norm %d, loss %d\n", int(dtype), int(images_dtype), int(norm), int(kind));
  return !right;
}

int run() {
  std::mt19937 random(0);
  int wrong = 0;
  const Patches even{2, 3, 1, 2, 2, 1, 8, 8, 3 * 16 * 16, 16 * 16, 0, 16, 1};
  const Patches odd{1, 2, 1, 2, 3, 1, 5, 3, 2 * 10 * 9, 10 * 9, 0, 9, 1};
  const Patches last{1, 3, 1, 1, 2, 1, 8, 8, 3 * 8 * 16, 1, 0, 3 * 16, 3};
  const Patches video{1, 3, 2, 2, 1, 2, 3, 4, 3 * 4 * 6 * 4, 4 * 6 * 4, 6 * 4, 4, 1};
  for (Norm norm : {Norm::none, Norm::patch})
    for (int masked : {0, 1, 2})
      wrong += compare(odd, DType::f32, DType::f32, Layout::hwc, norm, Loss::squared, masked, random);
  wrong += compare(odd, DType::f32, DType::f32, Layout::chw, Norm::channel, Loss::cosine, 2, random);
  wrong += compare(odd, DType::f32, DType::f32, Layout::chw, Norm::none, Loss::l1, 2, random);
  wrong += compare(even, DType::f32, DType::f32, Layout::hwc, Norm::none, Loss::cosine, 2, random);
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    wrong += compare(even, dtype, DType::f32, Layout::hwc, Norm::patch, Loss::squared, 2, random);
    wrong += compare(last, dtype, dtype, Layout::hwc, Norm::patch, Loss::squared, 2, random);
    wrong += compare(video, dtype, DType::u8, Layout::hwc, Norm::channel, Loss::squared, 2, random);
    wrong += compare(odd, dtype, dtype, Layout::hwc, Norm::layer, Loss::smooth_l1, 2, random);
  }
  return wrong;
}

}  // namespace
}  // namespace sslops::masked_prediction

int main() { return sslops::masked_prediction::run() != 0; }
