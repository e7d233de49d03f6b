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
  // weight 0 is not read. errors: memory for [B, L]. d_pred [B, L, C * height * width], unless null: grad times the
  // gradient of the one sum over the other; 0 where the mask is.
  Sums (*loss)(Prediction pred, Target target, const float* mask, float grad, float* errors, void* d_pred);
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::masked_patch_mse
