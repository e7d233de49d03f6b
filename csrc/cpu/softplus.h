// log(1 + e^y), the logistic loss of y, and its derivative.
#pragma once
#include "softmax.h"

namespace sslops {
namespace {

// log(1 + u) for u in [0, 1], relative error below 1e-7: 2 artanh(u / (2 + u)) by a polynomial in its square.
SSLOPS_INLINE F log1p_of_unit(F u) {
  const F t = u / (u + 2.f), z = t * t;
  F p = splat(0.281577796f);
  p = p * z + 0.279651582f;
  p = p * z + 0.400245965f;
  p = p * z + 0.666663229f;
  p = p * z + 2.f;
  return t * p;
}

struct Softplus {
  F value, slope;

  SSLOPS_INLINE explicit Softplus(F y) {
    const I positive = y > 0.f;
    const F u = exp_nonpositive(select(positive, -y, y)), share = 1.f / (u + 1.f);
    value = select(positive, y, F{}) + log1p_of_unit(u);
    slope = select(positive, share, u * share);
  }
};

}  // namespace
}  // namespace sslops
