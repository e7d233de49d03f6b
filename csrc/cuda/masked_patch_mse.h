// The loss of MAE on a CUDA device: a block for each masked patch.
#pragma once
#include <cstdint>

#include "../common/masked_patch_mse.h"

namespace sslops::masked_patch_mse {

// loss: the mean squared error of each patch, times its weight in mask [B, L], over the sum of the weights; inverse:
// one over that sum. Both 0 where it is. errors: memory for [B, L].
void cuda_forward(Prediction pred, Target target, const float* mask, float* errors, float* loss, float* inverse,
                  void* stream);
// d_pred = grad 2 / size inverse mask (pred - target), grad and inverse being on the device
void cuda_backward(Prediction pred, Target target, const float* mask, const float* grad, const float* inverse,
                   void* d_pred, void* stream);

}  // namespace sslops::masked_patch_mse
