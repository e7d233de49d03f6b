// The softmax over candidates that pass by in tiles: its exponential, its maximum, and what closes it.
#pragma once
#include <math.h>

#include "rows.h"
#include "vec.h"

namespace sslops {
namespace {

constexpr float kInf = __builtin_inff(), kLowest = -__FLT_MAX__;

// Below this temperature the maximum is tracked, which costs a second exponential per pair. Above it, with 1 for the
// maximum, no sum of exp((s - 1) / tau) is below exp(-43): half of float32's range, the other half being for grad / r.
// (|s| is at most 1.01, whatever rounding did to unit rows.)
constexpr double kLowestFixedTemperature = 2.02 / 43;

// Logits are s / tau, and exponents (s - top) / tau.
struct Scale {
  double tau;     // NaN if it is not positive: that makes everything NaN
  float inverse;  // 1 / tau, never 0: at an infinite temperature all pairs weigh the same, but -inf stays -inf
  bool fixed;     // the maximum is taken to be `top`
  float top;

  Scale(double temperature, bool normalized, float top = 1.f)  // normalized: no |s| is above top
      : tau(temperature > 0. ? temperature : __builtin_nan("")),
        inverse(1. / tau < __FLT_MIN__ ? __FLT_MIN__ : static_cast<float>(1. / tau)),
        fixed(normalized && tau >= kLowestFixedTemperature * top),
        top(top) {}
};

// e^x for -87.3 <= x <= 88: relative error below 1.5e-7; NaN stays NaN. In two steps of ln 2, so that large exponents
// are as exact as their logits.
SSLOPS_INLINE F exp_bounded(F x) {
  const float magic = 12583039.f;  // 1.5 * 2^23 + 127: adding it leaves the rounded number's exponent in the low bits
  const F biased = x * 1.44269504088896f + magic, whole = biased - magic;
  const F f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // in [-ln 2 / 2, ln 2 / 2]
  F p = splat(0.0013836742145940661f);
  p = p * f + 0.008374792523682117f;
  p = p * f + 0.04166822507977486f;
  p = p * f + 0.16666419804096222f;
  p = p * f + 0.49999991059303284f;
  p = p * f + 1.f;
  p = p * f + 1.f;
  return p * (F)((U)biased << 23);
}
// The same for any x <= 88: 0 below -87.3.
SSLOPS_INLINE F exp_nonpositive(F x) { return select(x < -87.3f, F{}, exp_bounded(x)); }
SSLOPS_INLINE float exp_nonpositive(float x) { return exp_nonpositive(splat(x))[0]; }

// A row's softmax once all its negatives have passed: r_neg, their sum of exp((s - top) / tau), and the positive's s.
struct Close {
  float loss, top, inverse, share;  // top: over the positive too; 1 / r with it; share of the negatives in r, which is
                                    // what the positive pulls
  float shrink;                     // what r_neg was multiplied by

  Close(float s, float r_neg, float top_neg, const Scale& scale) {
    top = scale.fixed ? scale.top : max(s, top_neg);
    shrink = scale.fixed ? 1.f : expf((top_neg - top) * scale.inverse);
    r_neg *= shrink;
    const float e_pos = expf((s - top) * scale.inverse), total = r_neg + e_pos;
    loss = r_neg < e_pos ? log1pf(r_neg / e_pos) : logf(total) + static_cast<float>((top - s) / scale.tau);
    inverse = 1.f / total;
    share = r_neg / total;
  }

  // Decoupled (arXiv 2110.06848): the positive is no term of the sum, and is weighted.
  static Close decoupled(float s, float r_neg, float top_neg, float weight, const Scale& scale) {
    const float top = scale.fixed ? scale.top : top_neg;
    const float inverse = r_neg == 0.f ? 0.f : 1.f / r_neg;  // without a negative there is nothing to weigh
    return {logf(r_neg) + static_cast<float>((top - weight * s) / scale.tau), top, inverse, weight, 1.f};
  }

 private:
  Close(float loss, float top, float inverse, float share, float shrink)
      : loss(loss), top(top), inverse(inverse), share(share), shrink(shrink) {}
};

}  // namespace
}  // namespace sslops
