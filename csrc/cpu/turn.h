// e^(i theta), as its sine and what its cosine lacks of 1: with it small turns lose no digits, however many follow.
#pragma once
#include <math.h>

#include "vec.h"

namespace sslops {
namespace {

struct Turn {
  F sine, versine;  // 1 - cosine
};

// Of theta + rest, |theta| <= pi / 4 and rest a rounding of it, to a unit in the last place.
SSLOPS_INLINE Turn small_turn(F theta, F rest) {
  const F square = theta * theta;
  F p = splat(-1.9514957608e-4f);
  p = p * square + 8.3321584084e-3f;
  p = p * square + -1.6666654573e-1f;
  F q = splat(-2.4475874016e-5f);
  q = q * square + 1.3887720755e-3f;
  q = q * square + -4.1666654720e-2f;
  q = q * square + 0.5f;
  const F versine = q * square, sine = (p * (theta * square) + (rest - rest * versine)) + theta;
  return {sine, rest * sine + versine};
}

// Where the numbers of quarter turns are too large for `turn`, and NaN.
__attribute__((noinline)) Turn far_turn(F theta) {
  float angles[kLanes], sines[kLanes], cosines[kLanes];
  store(angles, theta);
  for (int k = 0; k < kLanes; ++k) sines[k] = sinf(angles[k]), cosines[k] = cosf(angles[k]);
  return {load(sines), 1.f - load(cosines)};
}

SSLOPS_INLINE Turn turn(F theta) {
  if (__builtin_expect(bits(!((F)((U)theta & 0x7fffffffu) < 12800.f)), false)) return far_turn(theta);
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it leaves the rounded number in the low bits
  const F biased = theta * 0.636619772f + magic, quarters = biased - magic;
  // pi / 2 in parts, of which products with up to 2^13 are exact
  const F most = theta - quarters * 1.5703125f, near = most - quarters * 4.837512969970703125e-4f;
  const F rest = ((most - near) - quarters * 4.837512969970703125e-4f) - quarters * 7.54978995489188216e-8f;
  const Turn t = small_turn(near, rest);
  const F cosine = 1.f - t.versine;
  const U quadrant = (U)biased & 3u;
  const I odd = (I)(quadrant << 31) < 0;
  const F sine = (F)((U)select(odd, cosine, t.sine) ^ (quadrant >> 1) << 31);
  const F turned = (F)((U)select(odd, t.sine, cosine) ^ ((quadrant + 1u) >> 1) << 31);
  return {sine, select((I)quadrant == 0, t.versine, 1.f - turned)};
}

}  // namespace
}  // namespace sslops
