// The loss of MAE over the patches of images, and its gradient.
#pragma once
#include <cstdint>

#include "../common/isa.h"
#include "../common/masked_patch_mse.h"

namespace sslops::masked_patch_mse {

struct Sums {
  double error, weight;
};

struct Table {
  // The mean squared error of each patch, times its weight in mask [B, L], and the weights, both summed. A patch of
  // weight 0 is not read. factors [2, C]: each pixel times the first row, plus the second, unless null. errors:
  // memory for [B, L]. d_pred [B, L, patch_size], unless null: grad times the gradient of the one sum over the other;
  // 0 where the mask is.
  Sums (*loss)(Prediction pred, Target target, const float* factors, const float* mask, float grad, float* errors,
               void* d_pred);

  // From Python: loss [] the one sum over the other, and inverse [] one over the weights' sum, both 0 where that is.
  // d_pred: as above under a grad of 1, or without elements. factors: on the host, or None.
  void (*call_forward)(Tensor pred, Tensor images, Tensor mask, int64_t frames, int64_t height, int64_t width,
                       Tensor factors, bool normalized, double eps, Tensor errors, Tensor loss, Tensor inverse,
                       Tensor d_pred);
  void (*call_backward)(Tensor pred, Tensor images, Tensor mask, int64_t frames, int64_t height, int64_t width,
                        Tensor factors, bool normalized, double eps, Tensor grad, Tensor inverse, Tensor d_pred);

  static constexpr auto bound() {
    return std::tuple{Bound{"masked_patch_mse", &Table::call_forward},
                      Bound{"masked_patch_mse_backward", &Table::call_backward}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::masked_patch_mse
