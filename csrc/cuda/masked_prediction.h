// The error of masked patches on a CUDA device: a block for each.
#pragma once
#include <cstdint>

#include "../common/bound.h"
#include "../common/masked_prediction.h"

namespace sslops {
struct Factors;  // patches.cuh
}

namespace sslops::masked_prediction {

// errors [B, L]: of each patch, times its weight in mask [B, L]. Unless they are null, loss: the errors' sum over that
// of the weights; inverse: one over that. Both 0 where it is.
void cuda_forward(Prediction pred, Target target, Error error, const Factors& factors, const float* mask, float* errors,
                  float* loss, float* inverse, void* stream);
// d_pred: the gradient of loss times grad [], beside its inverse; of errors times grad [B, L] where that is null. All
// on the device.
void cuda_backward(Prediction pred, Target target, Error error, const Factors& factors, const float* mask,
                   const float* grad, const float* inverse, void* d_pred, void* stream);

// What Python calls, on the stream it gives.
struct CudaTable {
  void (*forward)(Tensor pred, Tensor images, Tensor mask, int64_t frames, int64_t height, int64_t width, bool hwc,
                  Tensor factors, int64_t norm, double eps, int64_t kind, double beta, Tensor errors, Tensor loss,
                  Tensor inverse, Stream stream);
  void (*backward)(Tensor pred, Tensor images, Tensor mask, int64_t frames, int64_t height, int64_t width, bool hwc,
                   Tensor factors, int64_t norm, double eps, int64_t kind, double beta, Tensor grad, Tensor inverse,
                   Tensor d_pred, Stream stream);

  static constexpr auto bound() {
    return std::tuple{Bound{"cuda_masked_prediction", &CudaTable::forward},
                      Bound{"cuda_masked_prediction_backward", &CudaTable::backward}};
  }
};
const CudaTable& cuda_table();

}  // namespace sslops::masked_prediction
