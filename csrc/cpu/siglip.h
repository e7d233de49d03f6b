// SigLIP (arXiv 2303.15343) of N images and their texts: softplus(-z_ij x_ij) summed over all pairs, over N, with x =
// logit_scale S + bias, S = image text^T, z_ii = 1 and -1 elsewhere. Each pair by itself: loss and gradients come from
// one pass, 6 N^2 D FLOP. Of a part, image [B, D] is first .. first + B of the N.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::siglip {

struct Table {
  // loss [], dimage [B, D], dtext [N, D], dlogit_scale [] and dbias []: what the B rows add to them. Either of dimage
  // and dtext may be empty; without both dlogit_scale is not found.
  void (*forward)(Tensor image, Tensor text, double logit_scale, double bias, bool normalize, DType operand,
                  int64_t first, Tensor loss, Tensor dimage, Tensor dtext, Tensor dlogit_scale, Tensor dbias);

  static constexpr auto bound() { return std::tuple{Bound{"siglip_forward", &Table::forward}}; }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::siglip
