// Chosen patches of images [B, C, ...], each a row of its pixels.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/patches.h"

namespace sslops::gather_patches {

struct Table {
  // out[b, k] = patch ids[b, k] of image b in `layout`, times the first row of factors [2, C] plus the second, unless
  // they are null. All ids [B, K] are patches. images: f32, f16, bf16 or u8; out: not u8.
  void (*forward)(const void* images, DType dtype, Patches patches, const int64_t* ids, int64_t k, Layout layout,
                  const float* factors, void* out, DType out_dtype);
  // d_images = the first row of factors times the sum of the rows of grad [B, K, patch_size] that are of this patch.
  // The pixels of a row lie side by side.
  void (*backward)(void* d_images, DType dtype, Patches patches, const int64_t* ids, int64_t k, Layout layout,
                   const float* factors, const void* grad, DType grad_dtype);

  // The same from Python: images [B, C, ...], ids [B, K], factors [2, C] or None, on the host.
  void (*call_forward)(Tensor images, Tensor ids, int64_t frames, int64_t height, int64_t width, bool hwc,
                       Tensor factors, Tensor out);
  void (*call_backward)(Tensor grad, Tensor ids, int64_t frames, int64_t height, int64_t width, bool hwc,
                        Tensor factors, Tensor d_images);

  static constexpr auto bound() {
    return std::tuple{Bound{"gather_patches", &Table::call_forward},
                      Bound{"gather_patches_backward", &Table::call_backward}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::gather_patches
