// The loss of MAE on a CUDA device: a block for each masked patch.
#pragma once
#include <cstdint>

#include "../common/bound.h"
#include "../common/masked_patch_mse.h"

namespace sslops {
struct Factors;  // patches.cuh
}

namespace sslops::masked_patch_mse {

// loss: the mean squared error of each patch, times its weight in mask [B, L], over the sum of the weights; inverse:
// one over that sum. Both 0 where it is. errors: memory for [B, L].
void cuda_forward(Prediction pred, Target target, const Factors& factors, const float* mask, float* errors, float* loss,
                  float* inverse, void* stream);
// d_pred = grad 2 / size inverse mask (pred - target), grad and inverse being on the device
void cuda_backward(Prediction pred, Target target, const Factors& factors, const float* mask, const float* grad,
                   const float* inverse, void* d_pred, void* stream);

// What Python calls, on the stream it gives.
struct CudaTable {
  void (*forward)(Tensor pred, Tensor images, Tensor mask, int64_t frames, int64_t height, int64_t width,
                  Tensor factors, bool normalized, double eps, Tensor errors, Tensor loss, Tensor inverse,
                  Stream stream);
  void (*backward)(Tensor pred, Tensor images, Tensor mask, int64_t frames, int64_t height, int64_t width,
                   Tensor factors, bool normalized, double eps, Tensor grad, Tensor inverse, Tensor d_pred,
                   Stream stream);

  static constexpr auto bound() {
    return std::tuple{Bound{"cuda_masked_patch_mse", &CudaTable::forward},
                      Bound{"cuda_masked_patch_mse_backward", &CudaTable::backward}};
  }
};
const CudaTable& cuda_table();

}  // namespace sslops::masked_patch_mse
