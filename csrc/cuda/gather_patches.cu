#include <cassert>
#include <cmath>

#include "gather_patches.h"
#include "patches.cuh"

namespace sslops::gather_patches {
namespace {

constexpr unsigned kThreads = 128;
constexpr int kSize = 4;  // values that a thread writes at a time
constexpr int kSums = 8;  // values that a thread adds up at a time

// A block for each row of out.
__global__ void __launch_bounds__(kThreads)
    gather(const void* __restrict__ images, DType dtype, Patches p, Divisors by, const int64_t* __restrict__ ids,
           int64_t k, Layout layout, Factors factors, void* __restrict__ out, DType out_dtype) {
  const int64_t row = blockIdx.x, id = ids[row];
  const unsigned size = static_cast<unsigned>(patch_size(p));
  const bool there = is_patch(p, id);
  assert(there);
  const int64_t from = there ? corner(p, blockIdx.x / static_cast<unsigned>(k), id) : 0;  // 32 bits: no call
  // Four values side by side in the images, too, where a row of pixels is a multiple of four.
  const bool together = layout == Layout::chw && p.pixel_stride == 1 && p.width % kSize == 0 && dtype != DType::u8;
  for (unsigned e = kSize * threadIdx.x; e < size; e += kSize * kThreads) {
    const int n = static_cast<int>(size - e < kSize ? size - e : kSize);
    float value[kSize] = {NAN, NAN, NAN, NAN};
    Walk at(p, by, layout, e);
    if (there && together) read(images, dtype, from + at.offset, n, value);
    for (int u = 0; u < kSize; ++u) {
      if (!there || u >= n || (together && !factors.used)) continue;
      value[u] = scaled(factors, together ? value[u] : pixel(images, dtype, from + at.offset), at.channel);
      if (!together) at.next(p, layout);
    }
    write(out, out_dtype, row * size + e, n, value);
  }
}

// A block for each patch of d_images: the rows of grad that are of this patch, in their order.
__global__ void __launch_bounds__(kThreads)
    add_up(void* d_images, DType dtype, Patches p, const int64_t* ids, int64_t k, Layout layout, Factors factors,
           const void* grad, DType grad_dtype) {
  const int64_t image = blockIdx.x / patch_count(p), id = blockIdx.x % patch_count(p), size = patch_size(p);
  const int64_t from = corner(p, image, id);
  for (int64_t first = threadIdx.x; first < size; first += kSums * blockDim.x) {
    float sum[kSums] = {};
    for (int64_t row = image * k; row < (image + 1) * k; ++row) {
      if (ids[row] != id) continue;
      for (int u = 0; u < kSums; ++u)
        if (const int64_t e = first + u * blockDim.x; e < size) sum[u] += pixel(grad, grad_dtype, row * size + e);
    }
    for (int u = 0; u < kSums; ++u)
      if (const int64_t e = first + u * blockDim.x; e < size) {
        const Place at = place(p, layout, e);
        set_pixel(d_images, dtype, from + at.offset, factors.used ? sum[u] * factors.scale[at.channel] : sum[u]);
      }
  }
}

}  // namespace

void cuda_forward(const void* images, DType dtype, Patches p, const int64_t* ids, int64_t k, Layout layout,
                  const Factors& factors, void* out, DType out_dtype, void* stream) {
  if (p.images * k > 0)
    launch(gather, p.images * k, kThreads, stream, images, dtype, p, divisors(p), ids, k, layout, factors, out,
           out_dtype);
}

void cuda_backward(void* d_images, DType dtype, Patches p, const int64_t* ids, int64_t k, Layout layout,
                   const Factors& factors, const void* grad, DType grad_dtype, void* stream) {
  if (p.images > 0)
    launch(add_up, p.images * patch_count(p), kThreads, stream, d_images, dtype, p, ids, k, layout, factors, grad,
           grad_dtype);
}

const CudaTable& cuda_table() {
  static constexpr CudaTable table{
      [](Tensor images, Tensor ids, int64_t frames, int64_t height, int64_t width, bool hwc, Tensor factors, Tensor out,
         Stream stream) {
        cuda_forward(images.data, images.dtype, patches_of(images, frames, height, width), ids.as<int64_t>(),
                     ids.sizes[1], Layout(hwc), packed("gather_patches", factors), out.data, out.dtype, stream.handle);
      },
      [](Tensor grad, Tensor ids, int64_t frames, int64_t height, int64_t width, bool hwc, Tensor factors,
         Tensor d_images, Stream stream) {
        cuda_backward(d_images.data, d_images.dtype, patches_of(d_images, frames, height, width), ids.as<int64_t>(),
                      ids.sizes[1], Layout(hwc), packed("gather_patches", factors), grad.data, grad.dtype,
                      stream.handle);
      }};
  return table;
}

}  // namespace sslops::gather_patches
