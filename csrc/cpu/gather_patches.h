// Chosen patches of images [B, C, H, W], each a row of C * height * width values.
#pragma once
#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/patches.h"

namespace sslops::gather_patches {

struct Table {
  // out[b, k] = patch ids[b, k] of image b in `layout`, times scale [C] plus shift [C] unless both are null. All ids
  // [B, K] are patches. images: f32, f16, bf16 or u8; out: not u8.
  void (*forward)(const void* images, DType dtype, Patches patches, const int64_t* ids, int64_t k, Layout layout,
                  const float* scale, const float* shift, void* out, DType out_dtype);
  // d_images = scale times the sum of the rows of grad [B, K, C * height * width] that are of this patch. The pixels
  // of a row lie side by side.
  void (*backward)(void* d_images, DType dtype, Patches patches, const int64_t* ids, int64_t k, Layout layout,
                   const float* scale, const void* grad, DType grad_dtype);

  // The same from Python: images [B, C, H, W], ids [B, K], factors [2, C] = scale, shift or None, on the host.
  void (*call_forward)(Tensor images, Tensor ids, int64_t height, int64_t width, bool hwc, Tensor factors, Tensor out);
  void (*call_backward)(Tensor grad, Tensor ids, int64_t height, int64_t width, bool hwc, Tensor factors,
                        Tensor d_images);

  static constexpr auto bound() {
    return std::tuple{Bound{"gather_patches", &Table::call_forward},
                      Bound{"gather_patches_backward", &Table::call_backward}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::gather_patches
