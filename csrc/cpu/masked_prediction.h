// The error of predicted patches where they were masked, and its gradient.
#pragma once
#include <cstdint>

#include "../common/isa.h"
#include "../common/masked_prediction.h"

namespace sslops::masked_prediction {

struct Sums {
  double error, weight;
};

struct Table {
  // The error of each patch, times its weight in mask [B, L], and the weights, both summed. A patch of weight 0 is not
  // read. factors [2, C]: each pixel times the first row, plus the second, unless null. errors [B, L]: the terms of the
  // first sum. d_pred [B, L, patch_size], unless null: the gradient of the one sum over the other times grad [], or
  // that of each term times grad [B, L]; 0 where the mask is.
  Sums (*loss)(Prediction pred, Target target, Error error, const float* factors, const float* mask, const float* grad,
               bool each, float* errors, void* d_pred);

  // From Python: loss [] the one sum over the other (None: errors are the result), and inverse [] one over the weights'
  // sum, both 0 where that is. d_pred: as above under a grad [] of 1, or without elements. factors: on the host, or
  // None.
  void (*call_forward)(Tensor pred, Tensor images, Tensor mask, int64_t frames, int64_t height, int64_t width, bool hwc,
                       Tensor factors, int64_t norm, double eps, int64_t kind, double beta, Tensor errors, Tensor loss,
                       Tensor inverse, Tensor d_pred);
  void (*call_backward)(Tensor pred, Tensor images, Tensor mask, int64_t frames, int64_t height, int64_t width,
                        bool hwc, Tensor factors, int64_t norm, double eps, int64_t kind, double beta, Tensor grad,
                        Tensor inverse, Tensor d_pred);

  static constexpr auto bound() {
    return std::tuple{Bound{"masked_prediction", &Table::call_forward},
                      Bound{"masked_prediction_backward", &Table::call_backward}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::masked_prediction
