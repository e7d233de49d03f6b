// The CUDA kernels against the CPU's: all dtypes, strides, ragged patches, masks of zeros, ones and other weights.
#include "cuda/masked_patch_mse.cu"

#include <cstdio>
#include <memory>
#include <random>

#include "cpu/masked_patch_mse.h"

namespace sslops::masked_patch_mse {
namespace {

int64_t item(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

std::unique_ptr<char[]> numbers(DType dtype, int64_t n, std::mt19937& random) {
  std::unique_ptr<char[]> bytes(new char[n * item(dtype)]);
  std::normal_distribution<float> normal;
  for (int64_t k = 0; k < n; ++k) set_pixel(bytes.get(), dtype, k, normal(random) + 1.f);
  return bytes;
}

bool close(float a, float b, DType dtype) {
  const float unit = dtype == DType::f32 ? 1e-5f : dtype == DType::f16 ? 1e-3f : 8e-3f;
  return std::fabs(a - b) <= unit * (std::fabs(a) + 1e-3f);
}

int compare(const Patches& p, DType dtype, DType images_dtype, bool normalized, int masked, std::mt19937& random) {
  const int64_t size = patch_size(p), count = patch_count(p), patches = p.images * count;
  // A token before the patches of each image, as a decoder gives it.
  const std::unique_ptr<char[]> tokens = numbers(dtype, p.images * (count + 1) * size, random);
  const std::unique_ptr<char[]> images = numbers(images_dtype, patches * size, random);
  const std::unique_ptr<float[]> mask(new float[patches]), errors(new float[patches]), others(new float[patches]);
  for (int64_t i = 0; i < patches; ++i) mask[i] = masked == 2 ? 0.5f * (random() % 3) : static_cast<float>(masked);
  const Prediction pred{tokens.get() + size * item(dtype), dtype, (count + 1) * size, size};
  const Target target{images.get(), images_dtype, p, normalized, 1e-6f};

  const std::unique_ptr<char[]> a(new char[patches * size * item(dtype)]), b(new char[patches * size * item(dtype)]);
  float loss = -1.f, inverse = -1.f;
  const float grad = 3.f;
  const Sums sums = portable::table.loss(pred, target, mask.get(), grad, errors.get(), a.get());
  cuda_forward(pred, target, mask.get(), others.get(), &loss, &inverse, nullptr);
  const float wanted = sums.weight == 0. ? 0.f : static_cast<float>(1. / sums.weight);
  bool right = close(wanted, inverse, DType::f32) && close(static_cast<float>(sums.error) * wanted, loss, DType::f32);

  cuda_backward(pred, target, mask.get(), &grad, &inverse, b.get(), nullptr);
  for (int64_t e = 0; e < patches * size; ++e)
    right = right && close(pixel(a.get(), dtype, e), pixel(b.get(), dtype, e), dtype);
  if (!right) std::printf("differs: dtypes %d, %d, masked %d\n", int(dtype), int(images_dtype), masked);
  return !right;
}

int run() {
  std::mt19937 random(0);
  int wrong = 0;
  const Patches even{2, 3, 2, 2, 8, 8, 3 * 16 * 16, 16 * 16, 16, 1}, odd{1, 2, 2, 3, 5, 3, 2 * 10 * 9, 10 * 9, 9, 1};
  const Patches last{1, 3, 1, 2, 8, 8, 3 * 8 * 16, 1, 3 * 16, 3};
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (bool normalized : {true, false}) {
      for (int masked : {0, 1, 2}) wrong += compare(odd, dtype, dtype, normalized, masked, random);
      wrong += compare(even, dtype, DType::f32, normalized, 2, random);
      wrong += compare(last, dtype, dtype, normalized, 2, random);
    }
  return wrong;
}

}  // namespace
}  // namespace sslops::masked_patch_mse

int main() { return sslops::masked_patch_mse::run() != 0; }
