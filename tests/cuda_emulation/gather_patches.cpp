// The CUDA kernels against the CPU's: all dtypes, both layouts, strides, rows that four divides and others, repeated
// ids.
#include "cuda/gather_patches.cu"

#include <cstdio>
#include <memory>
#include <random>

#include "cpu/gather_patches.h"

namespace sslops::gather_patches {
namespace {

int64_t item(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2; }

// Exactly as many bytes as there are elements; small whole numbers, so that sums are the same in every order.
std::unique_ptr<char[]> numbers(DType dtype, int64_t n, std::mt19937& random) {
  std::unique_ptr<char[]> bytes(new char[n * item(dtype)]);
  for (int64_t k = 0; k < n; ++k) {
    const int x = static_cast<int>(random() % 8);
    if (dtype == DType::u8)
      bytes[k] = static_cast<char>(x);
    else
      set_pixel(bytes.get(), dtype, k, static_cast<float>(x - 3));
  }
  return bytes;
}

int compare(const Patches& p, int64_t k, DType dtype, DType out_dtype, Layout layout, bool scaled,
            std::mt19937& random) {
  const int64_t size = patch_size(p), count = patch_count(p), pixels = p.images * count * size;
  const std::unique_ptr<char[]> images = numbers(dtype, pixels, random);
  const std::unique_ptr<char[]> grad = numbers(out_dtype, p.images * k * size, random);
  const std::unique_ptr<int64_t[]> ids(new int64_t[p.images * k]);
  for (int64_t i = 0; i < p.images * k; ++i) ids[i] = random() % count;
  Factors factors{scaled, {}, {}};
  for (int c = 0; c < kMaxChannels; ++c) factors.scale[c] = 2.f + c, factors.shift[c] = 1.f - c;
  float rows[2 * kMaxChannels];  // of p.channels
  for (int c = 0; c < p.channels; ++c) rows[c] = factors.scale[c], rows[p.channels + c] = factors.shift[c];
  const float* const both = scaled ? rows : nullptr;

  const int64_t bytes = p.images * k * size * item(out_dtype);
  const std::unique_ptr<char[]> a(new char[bytes]), b(new char[bytes]);
  portable::table.forward(images.get(), dtype, p, ids.get(), k, layout, both, a.get(), out_dtype);
  cuda_forward(images.get(), dtype, p, ids.get(), k, layout, factors, b.get(), out_dtype, nullptr);
  int wrong = std::memcmp(a.get(), b.get(), bytes) != 0;

  Patches q = p;  // of a gradient: contiguous
  q.pixel_stride = 1, q.row_stride = p.grid_width * p.width, q.frame_stride = p.grid_height * p.height * q.row_stride;
  q.channel_stride = p.grid_frames * p.frames * q.frame_stride;
  if (dtype != DType::u8) {
    const std::unique_ptr<char[]> c(new char[pixels * item(dtype)]), d(new char[pixels * item(dtype)]);
    portable::table.backward(c.get(), dtype, q, ids.get(), k, layout, both, grad.get(), out_dtype);
    cuda_backward(d.get(), dtype, q, ids.get(), k, layout, factors, grad.get(), out_dtype, nullptr);
    wrong += std::memcmp(c.get(), d.get(), pixels * item(dtype)) != 0;
  }

  // An id that is no patch: NaN, and no part in the gradient.
  ids[0] = count;
  cuda_forward(images.get(), dtype, p, ids.get(), k, layout, factors, b.get(), out_dtype, nullptr);
  for (int64_t e = 0; e < size; ++e) wrong += pixel(b.get(), out_dtype, e) == pixel(b.get(), out_dtype, e);
  ids[0] = -1;
  if (dtype != DType::u8) {
    const std::unique_ptr<char[]> c(new char[pixels * item(dtype)]);
    cuda_backward(c.get(), dtype, q, ids.get(), k, layout, factors, grad.get(), out_dtype, nullptr);
  }
  if (wrong) std::printf("differs: dtypes %d, %d, layout %d\n", int(dtype), int(out_dtype), int(layout));
  return wrong;
}

int run() {
  std::mt19937 random(0);
  int wrong = 0;
  // Contiguous rows of 8 and of 3 pixels, channels_last, a signal, and a video of 2 x 3 x 4.
  const Patches wide{2, 3, 1, 2, 3, 1, 4, 8, 3 * 8 * 24, 8 * 24, 0, 24, 1};
  const Patches odd{1, 2, 1, 2, 2, 1, 5, 3, 2 * 10 * 6, 10 * 6, 0, 6, 1};
  const Patches last{2, 3, 1, 1, 2, 1, 8, 8, 3 * 8 * 16, 1, 0, 3 * 16, 3};
  const Patches signal{2, 2, 1, 1, 3, 1, 1, 7, 2 * 21, 21, 0, 0, 1};
  const Patches video{2, 2, 2, 3, 2, 2, 3, 4, 2 * 4 * 9 * 8, 4 * 9 * 8, 9 * 8, 8, 1};
  for (DType dtype : {DType::f32, DType::u8})
    for (Layout layout : {Layout::chw, Layout::hwc}) {
      wrong += compare(wide, 5, dtype, DType::f32, layout, false, random);
      wrong += compare(odd, 7, dtype, DType::f32, layout, true, random);
      wrong += compare(last, 2, dtype, DType::bf16, layout, true, random);
      wrong += compare(signal, 4, dtype, DType::f32, layout, false, random);
      wrong += compare(video, 9, dtype, DType::f32, layout, true, random);
    }
  for (DType dtype : {DType::bf16, DType::f16}) {
    wrong += compare(wide, 5, dtype, dtype, Layout::chw, true, random);
    wrong += compare(last, 2, dtype, DType::f32, Layout::hwc, false, random);
    wrong += compare(video, 9, dtype, dtype, Layout::hwc, true, random);
  }
  return wrong;
}

}  // namespace
}  // namespace sslops::gather_patches

int main() { return sslops::gather_patches::run() != 0; }
