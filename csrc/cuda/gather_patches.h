// Chosen patches of images on a CUDA device, and the gradient's way back: a launch each.
#pragma once
#include <cstdint>

#include "../common/bound.h"
#include "../common/dtype.h"
#include "../common/patches.h"

namespace sslops {
struct Factors;  // patches.cuh
}

namespace sslops::gather_patches {

// As the CPU's table says; a row of NaN for an id that is no patch, which backward passes over.
void cuda_forward(const void* images, DType dtype, Patches patches, const int64_t* ids, int64_t k, Layout layout,
                  const Factors& factors, void* out, DType out_dtype, void* stream);
void cuda_backward(void* d_images, DType dtype, Patches patches, const int64_t* ids, int64_t k, Layout layout,
                   const Factors& factors, const void* grad, DType grad_dtype, void* stream);

// What Python calls, on the stream it gives.
struct CudaTable {
  // factors: on the host, for at most kMaxChannels channels.
  void (*forward)(Tensor images, Tensor ids, int64_t frames, int64_t height, int64_t width, bool hwc, Tensor factors,
                  Tensor out, Stream stream);
  void (*backward)(Tensor grad, Tensor ids, int64_t frames, int64_t height, int64_t width, bool hwc, Tensor factors,
                   Tensor d_images, Stream stream);

  static constexpr auto bound() {
    return std::tuple{Bound{"cuda_gather_patches", &CudaTable::forward},
                      Bound{"cuda_gather_patches_backward", &CudaTable::backward}};
  }
};
const CudaTable& cuda_table();

}  // namespace sslops::gather_patches
